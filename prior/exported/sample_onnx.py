"""Draw new images from the exported networks beside this file. It needs numpy, onnxruntime and pillow."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder, generator = Path(__file__).parent, np.random.default_rng(seed=0)
about = json.loads((folder / "about.json").read_text("utf-8"))
prior, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("prior", "decoder"))

labels = generator.choice(len(about["label_frequencies"]), 16, p=about["label_frequencies"])  # or np.full(16, 3)
both = (labels, np.full_like(labels, about["no_label"]))  # (N,) each
uniforms = generator.random((len(labels), *about["map_shape"]))  # (N, H, W), one for each code
indices = np.zeros(uniforms.shape, np.int64)
for i, j in np.ndindex(*about["map_shape"]):  # row by row, from the top left
    labelled, unlabelled = (prior.run(None, {"indices": indices, "labels": each})[0][:, :, i, j] for each in both)
    logits = unlabelled + about["guidance"] * (labelled.astype(np.float64) - unlabelled)  # (N, K)
    cumulative = np.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
    indices[:, i, j] = (cumulative <= uniforms[:, i, j, None] * cumulative[:, -1:]).sum(axis=1)

images = decoder.run(None, {"indices": indices})[0]  # (N, C, S, T) float32 in 0..1
strip = np.concatenate(images, axis=2).transpose(1, 2, 0).squeeze()  # side by side
Image.fromarray((strip * 255).round().astype(np.uint8).repeat(3, 0).repeat(3, 1)).save("samples.png")
