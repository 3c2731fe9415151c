"""The exported networks: equal to the pair's, for any batch, and enough to draw with where this project is not."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from prior import Pair, export_pair
from prior.sampling import GUIDANCE, plain_logits, sample_codes
from tests.helpers import ROOT, random_maps, save_pair
from vqvae.compute import eval_mode
from vqvae.data.pixels import to_unit_range
from vqvae.errors import InputError
from vqvae.storage.files import write_atomically

EXTRA = ("onnx", "onnxruntime", "onnxscript")
TEXTS = ["README.md", "about.json", "sample.py"]


class Exported(NamedTuple):
    pair: Pair
    folder: Path
    differences: dict[str, float]


@pytest.fixture(
    scope="module",
    params=[("onnx", (3, 8, 16), 3), ("torch", (1, 16, 8), 3), ("torch", (3, 8, 8), 0)],
    ids=["onnx, colour", "torch, grey", "torch, no classes"],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A small pair and what it was exported as. The torch format has to do without the packages of the extra."""
    format, image_shape, num_classes = request.param
    folder = tmp_path_factory.mktemp("pair")
    pair = save_pair(folder, image_shape, num_classes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for package in EXTRA if format == "torch" else ():
            monkeypatch.setitem(sys.modules, package, None)
        return Exported(pair, folder / "new" / "exported", export_pair(pair, folder / "new" / "exported", format))


def open_network(folder: Path, name: str) -> Callable[..., Tensor]:
    path = next(folder.glob(f"{name}.*"))
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [node.name for node in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))[0]
    )


def test_each_network_gives_what_the_pair_gives_for_any_batch(exported: Exported) -> None:
    pair, folder, _ = exported
    encode, decode, logits = (open_network(folder, name) for name in ("encoder", "decoder", "prior"))
    for num in (1, 5, 40):
        images = torch.rand(num, *pair.vqvae.image_shape, generator=torch.Generator().manual_seed(2))
        indices, labels = random_maps(num, pair.prior), torch.arange(num) % (pair.info.num_classes + 1)
        with eval_mode(pair.prior):
            assert encode(images).equal(pair.encode(images))
            torch.testing.assert_close(decode(indices), pair.decode(indices), rtol=0, atol=1e-5)
            torch.testing.assert_close(logits(indices, labels), pair.prior(indices, labels), rtol=0, atol=1e-4)


def test_the_folder_has_these_files_and_none_of_them_tells_where_they_were_made(exported: Exported) -> None:
    contents = {path.name: path.read_bytes() for path in exported.folder.iterdir()}
    ending = next(exported.folder.glob("prior.*")).suffix
    assert sorted(contents) == sorted([*TEXTS, *(f"{name}{ending}" for name in ("encoder", "decoder", "prior"))])
    assert [name for name, content in contents.items() if str(ROOT).encode() in content] == []
    assert [path.name for path in exported.folder.parent.iterdir()] == ["exported"]


def test_what_a_program_needs_to_know_is_told(exported: Exported) -> None:
    pair, folder, differences = exported
    about, readme = json.loads((folder / "about.json").read_text()), (folder / "README.md").read_text()
    assert (tuple(about["image_shape"]), tuple(about["map_shape"])) == (pair.vqvae.image_shape, pair.prior.map_shape)
    assert (about["num_codes"], about["no_label"]) == (pair.prior.num_codes, pair.prior.no_label)
    assert about["class_names"] == list(pair.info.class_names)
    assert about["label_frequencies"] == (pair.info.class_frequencies.tolist() or [1.0])
    assert about["guidance"] == (GUIDANCE if pair.info.num_classes else 1)
    assert about["vqvae_fingerprint"] == pair.vqvae_header.fingerprint
    assert about["prior_fingerprint"] == pair.prior_header.fingerprint
    assert about["largest_differences"] == differences
    assert list(differences) == ["encoder", "decoder", "prior"]
    assert differences["encoder"] == 0
    assert max(differences.values()) < 1e-4
    height, width = pair.prior.map_shape
    assert f"| indices (B, {height}, {width}), labels (B) | logits (B, 16, {height}, {width}) | 0." in readme
    assert pair.prior_header.fingerprint[:12] in readme
    assert ("There are no classes" in readme) == (not pair.info.class_names)
    assert ("class 0, class 1, class 2" in readme) == bool(pair.info.class_names)


def test_twenty_lines_draw_what_the_project_draws_by_the_same_random_numbers_without_it(
    exported: Exported, tmp_path: Path
) -> None:
    pair, folder, _ = exported
    lines = (folder / "sample.py").read_text().split('"""\n', 1)[1].splitlines()
    assert len([line for line in lines if line]) <= 20
    program = (
        "import runpy, sys, numpy as np; sys.modules['prior'] = sys.modules['vqvae'] = None; "
        f"names = runpy.run_path({str(folder / 'sample.py')!r}); "
        "np.savez('drawn.npz', **{name: names[name] for name in ('labels', 'uniforms', 'indices', 'images')})"
    )
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", program], cwd=tmp_path, check=True)
    drawn = {name: torch.from_numpy(array) for name, array in np.load(tmp_path / "drawn.npz").items()}
    with eval_mode(pair.prior):
        options: dict[str, Any] = {"no_label": pair.prior.no_label, "guidance": GUIDANCE}
        own = sample_codes(plain_logits(pair.prior), drawn["uniforms"], drawn["labels"], **options)
    assert drawn["indices"].equal(own)
    assert len(own.unique(dim=0)) > 1
    assert (len(drawn["labels"].unique()) > 1) == (pair.info.num_classes > 1)
    torch.testing.assert_close(drawn["images"], pair.decode(own), rtol=0, atol=1e-5)
    channels, height, width = pair.vqvae.image_shape
    with Image.open(tmp_path / "samples.png") as picture:
        assert (picture.size, picture.mode) == ((3 * len(own) * width, 3 * height), "L" if channels == 1 else "RGB")
        pixels = np.asarray(picture)[1::3, 1::3].reshape(height, len(own), width, channels)
    torch.testing.assert_close(
        torch.tensor(pixels).permute(1, 3, 0, 2) / 255, drawn["images"], rtol=0, atol=0.5001 / 255
    )


def test_a_pair_of_another_type_and_mode_is_exported_in_float32_and_stays_as_it_was(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, (1, 8, 8))
    pair.vqvae.bfloat16().train()
    pair.prior.bfloat16().train()
    export_pair(pair, tmp_path / "exported", "torch")
    assert open_network(tmp_path / "exported", "decoder")(random_maps(3, pair.prior)).dtype == torch.float32
    for model in (pair.vqvae, pair.prior):
        assert model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("network", "place", "wrong"),
    [
        ("encoder", "torch.Tensor.argmin", Tensor.argmax),
        ("decoder", "prior.export.to_unit_range", lambda x: to_unit_range(x) + 1e-3),
        ("decoder", "prior.export.to_unit_range", lambda x: 0 * x / 0),
    ],
)
def test_a_network_that_differs_is_refused_and_nothing_is_written(
    network: str, place: str, wrong: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = save_pair(tmp_path, (1, 8, 8))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(place, wrong)
    with pytest.raises(
        InputError, match=f"an exported {network} that differs by at most 0.0001, found a difference of"
    ):
        export_pair(pair, tmp_path / "exported", "torch")
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, place = save_pair(tmp_path, (1, 8, 8)), tmp_path / "new" / "exported"

    def fail_at_the_end(path: Path, content: bytes) -> None:
        if path.name == "sample.py":
            raise OSError(errno.ENOSPC, "No space left")
        write_atomically(path, content)

    monkeypatch.setattr("prior.export._networks", lambda pair: {})  # the texts alone
    monkeypatch.setattr("prior.export.write_atomically", fail_at_the_end)
    with pytest.raises(InputError, match=r"expected to write .*exported: No space left"):
        export_pair(pair, place, "torch")
    assert list(place.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_already_stays_and_is_refused_first(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, place = save_pair(tmp_path, (1, 8, 8)), tmp_path / "exported"
    make = {"folder": place.mkdir, "file": place.touch, "link": lambda: place.symlink_to("nowhere")}
    make[kind]()
    monkeypatch.setattr("prior.export._networks", None)
    with pytest.raises(InputError, match=r"expected a new folder as `output`, found .*exported there already; name"):
        export_pair(pair, place, "torch")
    assert (place.is_symlink(), place.is_dir(), place.is_file()) == (kind == "link", kind == "folder", kind == "file")


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected `format` to be onnx or torch, found 'tflite'"):
        export_pair(save_pair(tmp_path, (1, 8, 8)), str(tmp_path / "exported"), "tflite")  # type: ignore[arg-type]


def test_onnx_is_refused_first_where_its_packages_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("prior.export._networks", None)
    with pytest.raises(InputError, match=r"found no onnxscript; install them with: pip install .*\[export\]"):
        export_pair(save_pair(tmp_path, (1, 8, 8)), tmp_path / "exported")
