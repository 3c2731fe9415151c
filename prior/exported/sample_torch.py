"""Draw new images from the exported networks beside this file. It needs torch, numpy and pillow."""

import json
from pathlib import Path

import torch
from PIL import Image

folder, generator = Path(__file__).parent, torch.Generator().manual_seed(0)
about = json.loads((folder / "about.json").read_text("utf-8"))
prior, decoder = (torch.export.load(folder / f"{name}.pt2").module() for name in ("prior", "decoder"))
torch.set_grad_enabled(False)

labels = torch.tensor(about["label_frequencies"]).multinomial(16, True, generator=generator)  # or torch.full((16,), 3)
both = (labels, torch.full_like(labels, about["no_label"]))  # (N,) each
uniforms = torch.rand(16, *about["map_shape"], dtype=torch.float64, generator=generator)  # (N, H, W), one for each code
indices = torch.zeros(uniforms.shape, dtype=torch.int64)
for i, j in torch.cartesian_prod(*map(torch.arange, about["map_shape"])):  # row by row, from the top left
    labelled, unlabelled = (prior(indices, each)[:, :, i, j].double() for each in both)  # (N, K)
    cumulative = (unlabelled + about["guidance"] * (labelled - unlabelled)).softmax(dim=1).cumsum(dim=1)
    indices[:, i, j] = (cumulative <= uniforms[:, i, j, None] * cumulative[:, -1:]).sum(dim=1)

images = decoder(indices)  # (N, C, S, T) float32 in 0..1
strip = torch.cat(list(images), dim=2).permute(1, 2, 0).squeeze()  # side by side
Image.fromarray((strip * 255).round().byte().numpy().repeat(3, 0).repeat(3, 1)).save("samples.png")
