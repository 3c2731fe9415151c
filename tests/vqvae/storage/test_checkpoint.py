"""Weights, header and resume state: read back as they were written, and refused if anything in them is another's."""

import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers import devices
from vqvae.errors import InputError, MissingFileError
from vqvae.storage import checkpoint
from vqvae.storage.checkpoint import Header, fingerprint, load_resume_state, read_header, save_resume_state
from vqvae.storage.recipe import require_range

CONFIG, DATA = {"width": 3, "kind": "plain"}, {"name": "made", "image_shape": (1, 5, 5)}


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    model.register_buffer("codebook", torch.randn(8, 4))
    model.register_buffer("initialised", torch.tensor(True))
    return model


def load(path: Path, model: nn.Module | None = None) -> tuple[nn.Module, Header]:
    return checkpoint.load(path, "vqvae", lambda header: model or build())


def save(path: Path, model: nn.Module | None = None, **changes: Any) -> Header:
    settings = {"stage": "vqvae", "config": CONFIG, "data": DATA, "recipe": {"lr": 2e-3}, "metrics": {"error": 0.25}}
    return checkpoint.save(path, model or build(), **{**settings, **changes})


def assert_same_tensors(found: Any, expected: Any) -> None:
    on_cpu = {name: tensor.cpu() for name, tensor in expected.items()}
    torch.testing.assert_close(dict(found), on_cpu, rtol=0, atol=0)


class Payload:
    """It makes a file when it is unpickled, as harmless code in the place of harmful code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def sealed(content: bytes) -> bytes:
    """A resume state of any content under the right checksum, as somebody who knows of it could write it."""
    return content + hashlib.sha256(content).hexdigest().encode()


@devices
def test_weights_and_header_are_read_back_on_the_cpu_as_they_were(tmp_path: Path, device: str) -> None:
    path = tmp_path / "vqvae.safetensors"
    written = save(path, build().to(device), vqvae_fingerprint="f" * 64)
    header = read_header(path, "vqvae")
    assert header == written
    assert (header.stage, header.config, header.format_version) == ("vqvae", CONFIG, 2)
    assert header.data == {"name": "made", "image_shape": [1, 5, 5]}  # as JSON has it
    assert (header.recipe, header.metrics, header.vqvae_fingerprint) == ({"lr": 2e-3}, {"error": 0.25}, "f" * 64)
    assert save(tmp_path / "by columns", build().to(memory_format=torch.channels_last)).vqvae_fingerprint is None
    save(tmp_path / "by columns", build().to(memory_format=torch.channels_last), vqvae_fingerprint="f" * 64)
    assert (tmp_path / "by columns").read_bytes() == path.read_bytes()  # the layout in memory does not matter
    loaded, found = load(path)
    assert found == header
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with path.open("r+b") as file:  # what was loaded does not change with the file
        file.write(bytes(path.stat().st_size))
    assert_same_tensors(loaded.state_dict(), build().state_dict())


@pytest.mark.parametrize("name", [b"other", "größer".encode(), b"caf\xe9", b"a\nb"])
def test_header_and_weights_come_from_one_file_whatever_its_name_and_whatever_takes_its_place(
    tmp_path: Path, name: bytes
) -> None:
    path, second, later = tmp_path / os.fsdecode(name), tmp_path / "second", build()
    with torch.no_grad():
        later.codebook.add_(1)
    first = save(path)
    save(second, later, metrics={"error": 0.125})

    def build_late(header: Header) -> nn.Module:
        second.replace(path)  # another run makes its save now
        return build()

    model, header = checkpoint.load(path, "vqvae", build_late)
    assert header == first
    assert_same_tensors(model.state_dict(), build().state_dict())
    assert_same_tensors(load(path)[0].state_dict(), later.state_dict())
    with pytest.raises(InputError, match="expected a prior checkpoint at ") as refusal:
        read_header(path, "prior")
    assert str(refusal.value).isprintable()


def test_one_changed_codebook_value_or_data_fact_changes_the_fingerprint(tmp_path: Path) -> None:
    path, model = tmp_path / "weights", build()
    before = save(path, recipe={}, metrics={}).fingerprint
    assert save(path, data={**DATA, "name": "other"}).fingerprint != before
    assert save(path, config={**CONFIG, "width": 4}).fingerprint != before
    model.codebook[5, 2] = torch.nextafter(model.codebook[5, 2], torch.tensor(9.0))  # the smallest change there is
    assert save(path, model).fingerprint == read_header(path, "vqvae").fingerprint != before
    header = save(path)
    assert header.fingerprint == before
    for changes in ({"config": {**CONFIG, "width": 4}}, {"data": {**header.data, "name": "other"}}):
        fields = asdict(replace(header, **changes))
        text = json.dumps({**fields, "checksum": hashlib.sha256(json.dumps(fields).encode()).hexdigest()})
        save_file(build().state_dict(), path, metadata={"header": text})
        with pytest.raises(InputError, match=r"expected weights in .*weights that match their header, found others"):
            load(path)


def test_the_fingerprint_depends_on_description_names_shapes_and_types() -> None:
    x = torch.arange(6, dtype=torch.float32)
    different = [{"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.view(torch.int32)}]
    different += [{"x": x[:3], "y": x[3:]}, {"x": x[:3], "y": x[3:].flip(0)}, {"x": torch.cat([x[:5], -x[5:]])}]
    prints = {fingerprint({}, tensors) for tensors in different} | {fingerprint({"k": k}, {"x": x}) for k in (8, 9)}
    assert len(prints) == 9
    # The order in which things are named does not matter.
    assert fingerprint({"a": 1, "b": 2}, {"x": x, "y": x}) == fingerprint({"b": 2, "a": 1}, {"y": x, "x": x})


def test_a_missing_file_and_one_of_another_stage_are_told_with_a_remedy(tmp_path: Path) -> None:
    save(tmp_path / "weights", stage="prior")
    with pytest.raises(InputError, match=r"expected a vqvae checkpoint at .*weights, found one of stage 'prior'"):
        read_header(tmp_path / "weights", "vqvae")
    message = r"^expected a prior checkpoint at .*/none, found none; create one with `train_prior\(\)`$"
    with pytest.raises(MissingFileError, match=message):
        read_header(tmp_path / "none", "prior")
    message = r"^expected a run to resume at .*/none, found none; start anew with `overwrite=True` instead of `resume"
    with pytest.raises(MissingFileError, match=message):
        load_resume_state(tmp_path / "none")


@pytest.mark.parametrize("version", [1, 3, True, "2", None])
def test_a_checkpoint_of_another_format_version_is_refused_in_a_sentence(tmp_path: Path, version: Any) -> None:
    # The first edition's header had no facts of the data.
    first = {"stage": "vqvae", "config": {"k": 8}, "recipe": {}, "metrics": {}, "fingerprint": "f" * 64}
    text = json.dumps({**first, "vqvae_fingerprint": None, "format_version": version, "checksum": "f" * 64})
    save_file(build().state_dict(), tmp_path / "weights", metadata={"header": text})
    message = rf"^expected format version 2 in .*weights, found {version}; train it anew with `train_vqvae\(\)`$"
    with pytest.raises(InputError, match=message if type(version) is int else "its header has no format version"):
        read_header(tmp_path / "weights", "vqvae")


def test_weights_that_do_not_fit_or_are_not_finite_and_a_configuration_that_is_refused(tmp_path: Path) -> None:
    path, model, message = (
        tmp_path / "weights",
        build(),
        r"found others; the file is damaged, create it anew with `train_vqvae\(\)`$",
    )
    for codebook in (build().codebook[:7], build().codebook.long(), None):
        other = build()
        other.codebook = codebook
        for saved, expected in ((build(), other), (other, build())):
            save(path, saved)
            with pytest.raises(InputError, match=message):
                load(path, expected)
    save(path)
    with pytest.raises(InputError, match=r"^expected `width` between 4 .* \(the vqvae checkpoint is .*/weights\)$"):
        checkpoint.load(path, "vqvae", lambda header: require_range("width", header.config["width"], 4, 9))
    for value in (float("nan"), float("inf")):
        model.codebook[7, 3] = value
        save(path, model)
        with pytest.raises(InputError, match=r"expected finite weights in .*weights, found codebook with values that"):
            load(path)


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_a_file_with_a_pickled_payload_is_refused_and_nothing_in_it_runs(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "file", tmp_path / "mark"
    content = {"model": Payload(mark), "step": 1}
    torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    path.write_bytes(pickle.dumps(content) if kind == "pickle" else sealed(path.read_bytes()))
    for read in (load_resume_state, lambda path: read_header(path, "vqvae"), load):
        with pytest.raises(InputError, match="found a file that is cut short, damaged or of another kind"):
            read(path)
    assert not mark.exists()
    if kind == "torch":  # the payload works: a reader that trusts the file runs it
        with pytest.raises(InputError, match="it holds more than plain data and tensors"):
            load_resume_state(path)
        torch.load(path, weights_only=False)
        assert mark.exists()


@devices
def test_a_resume_state_is_read_back_on_the_cpu_as_it_was(tmp_path: Path, device: str) -> None:
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 2, 5, 5, device=device)).square().mean().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "best": float("inf")}
    path = tmp_path / "resume.pt"
    save_resume_state(path, state)
    found = load_resume_state(path)
    assert (found["step"], found["best"]) == (3, float("inf"))
    assert_same_tensors(found["model"], model.state_dict())
    for i, moments in optimizer.state_dict()["state"].items():
        assert_same_tensors(found["optimizer"]["state"][i], moments)
    path.write_bytes(sealed(path.read_bytes()[:-64].replace(b"\x03\0\0\0cpu", b"\x03\0\0\0mps")))  # from a device that
    assert_same_tensors(load_resume_state(path)["model"], model.state_dict())  # this machine may lack


@pytest.mark.parametrize(
    ("content", "entry", "message"),
    [
        ([1, 2], (), "it holds a list and no dictionary"),
        ({}, ("zeros", bytes(10**6), zipfile.ZIP_DEFLATED), "compressed entries"),  # it could unpack to any size
        ({}, ("archive/constants.pkl", b""), "TorchScript"),
    ],
)
def test_a_resume_state_of_another_make_is_refused(tmp_path: Path, content: Any, entry: Any, message: str) -> None:
    path = tmp_path / "archive"
    torch.save(content, path)
    with zipfile.ZipFile(path, "a") as archive:
        _ = entry and archive.writestr(*entry)
    path.write_bytes(sealed(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        load_resume_state(path)
