import hashlib
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vqvae.common import checkpoint
from vqvae.common.checkpoint import Header, fingerprint, load, load_resume_state, read_header, save_resume_state
from vqvae.common.errors import UserError

CONFIG = {"width": 3, "kind": "plain"}


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    model.register_buffer("codebook", torch.randn(8, 4))
    return model


def save(path: Path, model: nn.Module | None = None, **changes: Any) -> Header:
    settings = {"stage": "vqvae", "config": CONFIG, "recipe": {"lr": 2e-3}, "metrics": {"squared_error": 0.25}}
    return checkpoint.save(path, model or build(), **{**settings, **changes})


def rewrite_header(path: Path, text: str | None) -> None:
    """The same weights under another header."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, metadata=None if text is None else {"header": text})


class Payload:
    """Unpickled, it makes a file: the harmless stand-in for code that does harm."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def write_payload(path: Path, how: str, mark: Path) -> None:
    if how == "pickle":
        path.write_bytes(pickle.dumps({"model": Payload(mark)}))
    else:
        content = {"model": Payload(mark), "epoch": 1}
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")


# --- Weights and their header


def test_weights_and_header_are_read_back_as_they_were(tmp_path: Path) -> None:
    path, model = tmp_path / "vqvae.safetensors", build()
    written = save(path, model, vqvae_fingerprint="f" * 64)
    header = read_header(path, "vqvae")
    assert header == written
    assert header.config == CONFIG
    assert header.recipe == {"lr": 2e-3}
    assert header.metrics == {"squared_error": 0.25}
    assert header.vqvae_fingerprint == "f" * 64
    loaded = load(path, header, lambda: build())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].device.type == "cpu"
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_are_stored_by_rows_whatever_their_layout_in_memory(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3)
    plain = save(tmp_path / "a", model)
    last = save(tmp_path / "b", model.to(memory_format=torch.channels_last))
    assert plain.fingerprint == last.fingerprint
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_one_changed_value_of_the_codebook_changes_the_fingerprint(tmp_path: Path) -> None:
    model = build()
    before = save(tmp_path / "a", model).fingerprint
    assert save(tmp_path / "b", build()).fingerprint == before
    model.codebook[5, 2] = torch.nextafter(model.codebook[5, 2], torch.tensor(9.0))  # by the least there is
    assert save(tmp_path / "c", model).fingerprint != before
    assert read_header(tmp_path / "c", "vqvae").fingerprint != before


def test_the_fingerprint_knows_configuration_names_shapes_and_types() -> None:
    x = torch.arange(6, dtype=torch.float32)
    prints = [
        fingerprint({}, {"x": x}),
        fingerprint({"k": 8}, {"x": x}),
        fingerprint({"k": 9}, {"x": x}),
        fingerprint({}, {"y": x}),
        fingerprint({}, {"x": x.reshape(2, 3)}),
        fingerprint({}, {"x": x.view(torch.int32)}),
        fingerprint({}, {"x": x[:3], "y": x[3:]}),
        fingerprint({}, {"x": x[:3], "y": x[3:].flip(0)}),
    ]
    assert len(set(prints)) == len(prints)
    # But not the order in which things are named.
    assert fingerprint({"a": 1, "b": 2}, {"x": x, "y": x}) == fingerprint({"b": 2, "a": 1}, {"y": x, "x": x})


def test_a_missing_checkpoint_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    message = r"expected a prior checkpoint at .*prior.safetensors, found none; .*: python cli.py train-prior"
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "prior.safetensors", "prior")
    with pytest.raises(UserError, match=r"a vqvae checkpoint at .*, found what can't be read: Is a directory; create"):
        read_header(tmp_path, "vqvae")


def test_a_checkpoint_of_the_other_stage_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "weights", stage="prior")
    with pytest.raises(UserError, match=r"expected a vqvae checkpoint at .*weights, found one of stage 'prior'"):
        read_header(tmp_path / "weights", "vqvae")


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    header = save(tmp_path / "weights")
    rewrite_header(tmp_path / "weights", json.dumps({**asdict(header), "format_version": 99}))
    with pytest.raises(UserError, match=r"expected format version 1 in .*weights, found 99; train it anew"):
        read_header(tmp_path / "weights", "vqvae")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", "{}", '{"stage": "vqvae", "nonsense": 1}'])
def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path: Path, text: str | None) -> None:
    save(tmp_path / "weights")
    rewrite_header(tmp_path / "weights", text)
    with pytest.raises(UserError, match=r"found a file that is .* of another kind .*; create one with"):
        read_header(tmp_path / "weights", "vqvae")


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save(path)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="found a file that is cut short, damaged or of another kind"):
            read_header(path, "vqvae")


def test_weights_with_one_flipped_bit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")  # behind the safetensors header
    for position in (start, (start + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        header = read_header(path, "vqvae")
        with pytest.raises(UserError, match=r"expected weights in .*weights that match their header, found others"):
            load(path, header, build)


@pytest.mark.parametrize("change", ["shape", "name", "type"])
def test_weights_of_another_network_are_refused(tmp_path: Path, change: str) -> None:
    model = build()
    if change == "shape":
        model.codebook = torch.randn(9, 4)
    elif change == "name":
        model.register_buffer("more", torch.zeros(1))
    else:
        model.codebook = model.codebook.double()
    header = save(tmp_path / "weights", model)
    with pytest.raises(UserError, match=r"create it anew with: python cli.py train-vqvae"):
        load(tmp_path / "weights", header, build)


def test_a_header_is_held_against_the_weights_before_memory_is_taken(tmp_path: Path) -> None:
    header = save(tmp_path / "weights")
    with pytest.raises(UserError, match="that match their header"):
        # Four terabytes: more than there is, if they were ever asked for.
        load(tmp_path / "weights", header, lambda: nn.Linear(1_000_000, 1_000_000))


@pytest.mark.parametrize("how", ["pickle", "torch", "torch-legacy"])
def test_weights_with_a_pickled_payload_are_refused_and_nothing_in_them_runs(tmp_path: Path, how: str) -> None:
    path, mark = tmp_path / "vqvae.safetensors", tmp_path / "mark"
    write_payload(path, how, mark)
    with pytest.raises(UserError, match="found a file that is cut short, damaged or of another kind"):
        read_header(path, "vqvae")
    with pytest.raises(Exception, match=r".*"):
        load(path, Header("vqvae", {}, {}, {}, ""), build)
    assert not mark.exists()


# --- What only resuming needs


def test_resume_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1, 5, 5)).square().mean().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "best": float("inf")}
    save_resume_state(tmp_path / "resume.pt", state)
    found = load_resume_state(tmp_path / "resume.pt")
    assert found["epoch"] == 3
    assert found["best"] == float("inf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(found["model"][name], tensor), name
    for i, moments in optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(found["optimizer"]["state"][i][name], tensor), name


def test_missing_resume_state_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run to resume at .*resume.pt, found none; .*without --resume"):
        load_resume_state(tmp_path / "resume.pt")


@pytest.mark.parametrize("how", ["pickle", "torch", "torch-legacy"])
def test_resume_state_with_a_pickled_payload_is_refused_and_nothing_in_it_runs(tmp_path: Path, how: str) -> None:
    path, mark = tmp_path / "resume.pt", tmp_path / "mark"
    write_payload(path, how, mark)
    for sealed in (False, True):  # the second time by somebody who knows of the checksum
        if sealed:
            path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).hexdigest().encode())
        with pytest.raises(UserError, match=r"expected a run to resume at .*resume.pt, found .* damaged"):
            load_resume_state(path)
    assert not mark.exists()
    # The payload is no dud: a reader that trusts the file runs it.
    if how == "torch":
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_resume_state_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resume.pt"
    save_resume_state(path, {"model": build().state_dict(), "epoch": 3})
    whole = path.read_bytes()
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"found a file that is cut short.*its checksum is not that of its content"):
            load_resume_state(path)


@pytest.mark.parametrize("content", [3, [1, 2], torch.zeros(3)])
def test_resume_state_that_is_no_dictionary_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "resume.pt")
    whole = (tmp_path / "resume.pt").read_bytes()
    (tmp_path / "resume.pt").write_bytes(whole + hashlib.sha256(whole).hexdigest().encode())
    with pytest.raises(UserError, match=r"found a file that is .* of another kind .* and no dictionary"):
        load_resume_state(tmp_path / "resume.pt")
