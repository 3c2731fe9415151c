"""The pair for other programs: encoder, decoder and the prior's logits, as ONNX (.onnx) or torch programs (.pt2).

    encoder    images (B, C, S, T) in 0..1 -> indices (B, H, W)
    decoder    indices (B, H, W) -> images (B, C, S, T) in 0..1
    prior      indices (B, H, W), labels (B,) -> logits (B, K, H, W)

B is any number of at least 1. Beside the networks, about.json holds what a program needs to know, README.md says it in
words, and sample.py draws images without this project. The last two come from the folder `exported`.
"""

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import Environment
from torch import Tensor, nn

from prior.pair import Pair
from prior.sampling import guidance_for
from vqvae.compute import eval_mode, seeded
from vqvae.data.pixels import to_unit_range
from vqvae.errors import InputError
from vqvae.model import VQVAE
from vqvae.shell import require_extra
from vqvae.storage.files import ANOTHER_PLACE, SCRATCH, refusals, require_writable, write_atomically

Format = Literal["onnx", "torch"]
ENDINGS: dict[Format, str] = {"onnx": "onnx", "torch": "pt2"}
TEXTS = Path(__file__).parent / "exported"
OPSET = 18  # what torch writes without conversion in every release that this project allows
TOLERANCE = 1e-4  # of the check; for outputs larger than 1 in proportion
BATCHES = (1, 2, 37)  # that the check runs
NUM_DRAWN = 20  # of the largest batch are drawn from the prior, and the others are noise


class ImageEncoder(nn.Module):
    """Images (B, C, S, T) in 0..1 to indices (B, H, W): `Pair.encode` without branches, which a graph cannot hold."""

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.encoder = vqvae.encoder
        codebook = vqvae.quantizer.codebook.detach()
        self.register_buffer("origin", codebook.mean(dim=0))  # against rounding, as in the quantizer
        self.register_buffer("codes", codebook - codebook.mean(dim=0))

    origin: Tensor  # (D,)
    codes: Tensor  # (K, D)

    def forward(self, images: Tensor) -> Tensor:
        vectors = self.encoder(images * 2 - 1).movedim(1, -1) - self.origin  # (B, H, W, D)
        distances = self.codes.square().sum(dim=1) - 2 * vectors @ self.codes.T  # (B, H, W, K), up to a constant
        return distances.argmin(dim=-1)


class MapDecoder(nn.Module):
    """Indices (B, H, W) to images (B, C, S, T) in 0..1: `Pair.decode`."""

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.quantizer, self.decoder = vqvae.quantizer, vqvae.decoder

    def forward(self, indices: Tensor) -> Tensor:
        return to_unit_range(self.decoder(self.quantizer.lookup(indices)))


class Network(NamedTuple):
    """What becomes one file, and what it has to give."""

    module: nn.Module
    inputs: dict[str, Tensor]  # by name, BATCHES[-1] of each
    output: str  # its name
    expected: Tensor  # the pair's own output
    compared: Callable[[Tensor], Tensor] = lambda output: output  # what the check compares of an output


def export_pair(
    pair: Pair,
    folder: str | Path,
    format: Format = "onnx",
    progress: Callable[[int], object] = lambda num_done: None,
) -> dict[str, float]:
    """Write the networks of a pair, in float32, to a new folder. Each is checked first, and all are written or none.

    Args:
        format: "onnx" for onnxruntime and others, "torch" for `torch.export.load`.
        progress: called with the number of networks that were finished since the last call.
    Returns:
        the largest difference of each network from the pair: of the decoder's images, of the prior's logits, and of
        the distances from the encoder's vectors to the codes that it chose, where 0 means that no other was chosen.
    Raises:
        InputError: another format, a package is missing, the folder exists already or cannot be written, or a network
            differs by more than `TOLERANCE`.
    """
    folder = Path(folder)
    if format not in ENDINGS:
        raise InputError(f"expected `format` to be onnx or torch, found {format!r:.80}; choose one of the two")
    if format == "onnx":
        require_extra("export", "onnx", "onnxruntime", "onnxscript")
    if folder.exists() or folder.is_symlink():
        raise InputError(f"expected a new folder as `output`, found {folder} there already; name another, or remove it")
    require_writable(folder, "name another `output`")
    files, differences = {}, {}
    networks = _networks(replace(pair, vqvae=_plain(pair.vqvae), prior=_plain(pair.prior)))
    for name, network in networks.items():
        files[f"{name}.{ENDINGS[format]}"] = content = _convert(network, format)
        differences[name] = _largest_difference(name, network, _open(content, format))
        progress(1)
    about = _about(pair, format, differences)
    sizes = {name: len(content) for name, content in files.items()}
    files["about.json"] = json.dumps(about, indent=2).encode()
    files["README.md"] = _readme(about, networks, sizes).encode()
    files["sample.py"] = (TEXTS / f"sample_{format}.py").read_bytes()
    _write_folder(folder, files)
    return differences


def _plain(model: nn.Module) -> Any:
    """A copy on the CPU, in float32 and in eval mode."""
    return deepcopy(model).cpu().float().eval()


def _networks(pair: Pair) -> dict[str, Network]:
    """The three networks by name, with inputs that the pair meets in use, and some that it does not."""
    vqvae, prior, num_others = pair.vqvae, pair.prior, BATCHES[-1] - NUM_DRAWN
    drawn, generator = pair.draw(NUM_DRAWN), seeded(0)
    images = torch.cat([drawn.images, torch.rand(num_others, *vqvae.image_shape, generator=generator)])
    others = torch.randint(prior.num_codes, (num_others, *prior.map_shape), generator=generator)
    indices = torch.cat([drawn.indices, others])
    labels = torch.cat([drawn.labels, torch.full((num_others,), prior.no_label)])
    with eval_mode(vqvae, prior):
        vectors, logits = vqvae.encode_continuous(images * 2 - 1), prior(indices, labels)

    def distances(chosen: Tensor) -> Tensor:
        return (vectors[: len(chosen)] - vqvae.quantizer.lookup(chosen)).norm(dim=1)

    maps = {"indices": indices}
    return {
        "encoder": Network(ImageEncoder(vqvae), {"images": images}, "indices", pair.encode(images), distances),
        "decoder": Network(MapDecoder(vqvae), maps, "images", pair.decode(indices)),
        "prior": Network(prior, {**maps, "labels": labels}, "logits", logits),
    }


def _convert(network: Network, format: Format) -> bytes:
    """The content of a network's file."""
    examples, batch = tuple(tensor[:2] for tensor in network.inputs.values()), torch.export.Dim("batch")
    program = torch.export.export(network.module, examples, dynamic_shapes=tuple({0: batch} for _ in examples))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source files, with paths on this machine
    if format == "torch":
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(network.inputs),
        output_names=[network.output],
        dynamic_shapes=({0: "batch"}, *({} for _ in examples[1:])),  # the name of the first axis, here of all
        verbose=False,
    )
    assert converted is not None  # so it is with dynamo
    return converted.model_proto.SerializeToString()


def _open(content: bytes, format: Format) -> Callable[..., Tensor]:
    """A network as another program would run it."""
    if format == "torch":
        return torch.export.load(io.BytesIO(content)).module()
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        (output,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        return torch.from_numpy(output)

    return run


@torch.no_grad()
def _largest_difference(name: str, network: Network, exported: Callable[..., Tensor]) -> float:
    """How far an exported network is from the pair, at most.

    Raises:
        InputError: by more than `TOLERANCE`.
    """
    expected, differences = network.compared(network.expected), []
    for num in BATCHES:
        found = network.compared(exported(*(tensor[:num] for tensor in network.inputs.values())))
        differences.append((found - expected[:num]).abs().max())
    largest = float(torch.stack(differences).max())  # NaN, if any is
    if not largest <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise InputError(
            f"expected an exported {name} that differs by at most {TOLERANCE:g}, found a difference of {largest:.1e}; "
            f"nothing was written, so try the other `format`, or other releases of its packages"
        )
    return largest


def _about(pair: Pair, format: Format, differences: Mapping[str, float]) -> dict[str, Any]:
    """What a program needs to know of the networks, as plain data."""
    info, prior = pair.info, pair.prior
    return {
        "data": info.name,
        "image_shape": info.image_shape,
        "map_shape": prior.map_shape,
        "num_codes": prior.num_codes,
        "class_names": info.class_names,
        "label_frequencies": info.class_frequencies.tolist() or [1.0],  # without classes the label is always 0
        "no_label": prior.no_label,
        "guidance": guidance_for(prior.num_classes, None),
        "vqvae_fingerprint": pair.vqvae_header.fingerprint,
        "prior_fingerprint": pair.prior_header.fingerprint,
        "made_by": f"torch {torch.__version__}" + (f", ONNX opset {OPSET}" if format == "onnx" else ""),
        "largest_differences": differences,
    }


def _readme(about: Mapping[str, Any], networks: Mapping[str, Network], sizes: Mapping[str, int]) -> str:
    """The README.md of the folder.

    Args:
        sizes: of the networks' files in bytes, by file name, in the order of the networks.
    """

    def shaped(name: str, tensor: Tensor) -> str:
        return f"{name} ({', '.join(['B', *map(str, tensor.shape[1:])])})"

    rows = [
        (
            file,
            ", ".join(shaped(*item) for item in network.inputs.items()),
            shaped(network.output, network.expected),
            f"{size / 1e6:.1f} MB",
            f"{about['largest_differences'][name]:.1g}",
        )
        for (name, network), (file, size) in zip(networks.items(), sizes.items(), strict=True)
    ]
    template = Environment(trim_blocks=True, keep_trailing_newline=True).from_string(
        (TEXTS / "README.md.jinja").read_text("utf-8")
    )
    return template.render(about=about, rows=rows, batches=BATCHES)


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder with its files, completely or not at all.

    Raises:
        InputError: something is there, or it cannot be written.
    """
    with refusals(f"expected to write {folder}", ANOTHER_PLACE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}.", suffix=SCRATCH) as scratch:
            made = Path(scratch) / "made"  # of the usual mode, which the folder around it does not have
            for name, content in files.items():
                write_atomically(made / name, content)
            made.rename(folder)
