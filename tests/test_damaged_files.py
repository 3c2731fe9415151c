"""Damaged, foreign and hostile files, given to every reader: each ends in one sentence, or in the right result.

The right result is what the undamaged file gives, where a checksum or a fingerprint covers the content. A recipe, which
a person may change, gives what it says, within the range of each setting.
"""

import hashlib
import json
import os
import resource
import signal
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

import prior.codes
from prior.codes import extract_cached
from prior.model import PriorConfig, load_prior
from prior.train import PriorTraining
from tests.helpers import CPU, ROOT, make_codes, make_info, make_prior, make_split, make_vqvae, save_model
from vqvae.data.dataset import digest
from vqvae.errors import InputError
from vqvae.loss import VQVAETraining
from vqvae.model import VQVAEConfig, load_vqvae
from vqvae.storage.checkpoint import fingerprint, load_resume_state, save_resume_state
from vqvae.storage.recipe import read_recipe, resolve
from vqvae.storage.tensors import Streamed, write_streamed

KINDS = ("vqvae", "prior", "resume", "recipe", "codes")
SHAPE = (1, 8, 8)
THINGS = {"pipe": os.mkfifo, "folder": Path.mkdir, "empty file": Path.touch}
LINKS = {"device": "/dev/zero", "link to nothing": "nothing", "link to itself": "codes-train.safetensors"}


class Valid:
    """One valid file of every kind, and what each gives."""

    def __init__(self, folder: Path) -> None:
        info = make_info(SHAPE)
        self.vqvae, self.prior = make_vqvae(SHAPE), make_prior((2, 2), width=2)
        header = save_model(folder / "vqvae", self.vqvae, "vqvae", info)
        other = save_model(folder / "another vqvae", make_vqvae(SHAPE, seed=1), "vqvae", info)
        prior_header = save_model(folder / "prior", self.prior, "prior", info, header.fingerprint)
        self.headers = {"vqvae": header, "prior": prior_header}
        save_model(folder / "prior of another", self.prior, "prior", info, other.fingerprint)
        save_resume_state(folder / "resume", {"model": dict(self.prior.state_dict()), "best": 0.5})
        self.split, self.codes = make_split(6, SHAPE), make_codes(6, self.prior)
        self.write_cache(folder / "codes", self.codes.indices.short())
        (folder / "recipe").write_bytes((ROOT / "configs" / "mnist.toml").read_bytes())
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.right = {kind: self.read(kind, folder / kind) for kind in KINDS if kind != "codes"} | {"any state": True}

    def write_cache(self, path: Path, indices: torch.Tensor) -> None:
        origin = {"vqvae": self.headers["vqvae"].fingerprint, "data": digest(self.split)}
        write_streamed(path, origin, {"indices": Streamed(indices.dtype, tuple(indices.shape), [indices])})

    def read(self, kind: str, path: Path) -> Any:
        if kind == "resume":
            state = load_resume_state(path)
            return fingerprint({name: state[name] for name in state if name != "model"}, state["model"])
        if kind == "any state":
            return type(load_resume_state(path)) is dict
        if kind == "recipe":
            for stage, classes in (("vqvae", (VQVAEConfig, VQVAETraining)), ("prior", (PriorConfig, PriorTraining))):
                one, other = resolve(classes, read_recipe(path, stage), {}, path)
                says = tomllib.loads(path.read_bytes().decode()).get(stage, {})
                assert says.items() <= (asdict(one) | asdict(other)).items()
            return True
        header = self.headers["vqvae"]
        model, header = load_vqvae(path, CPU) if kind == "vqvae" else load_prior(path, self.vqvae, header, CPU)
        assert type(header.recipe) is type(header.metrics) is dict  # nothing reads what they say
        return replace(header, recipe={}, metrics={}), fingerprint({}, model.state_dict())

    def believes(self, kind: str, path: Path) -> bool:
        """Whether a file is read. What it gives must be right, and if it is refused, one sentence must name it."""
        if kind == "codes":
            return self.believes_cache(path)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = self.read(kind, path)
        except InputError as error:
            found, text = None, str(error)
            assert str(path) in text
            assert "expected" in text or "unknown key" in text
            assert text.isprintable()  # so it is on one line
            assert len(text) < 1000
        assert found in (None, self.right[kind])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**16  # kilobytes beyond the peak so far
        return found is not None

    def believes_cache(self, path: Path) -> bool:
        """Whether a cache is believed. The codes are right in any case, because a cache that is not is made anew."""
        extracted = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prior.codes, "encode_images", lambda *_: extracted.append(True) or self.codes.indices)
            for _ in range(2):
                found = extract_cached(self.vqvae, self.headers["vqvae"].fingerprint, self.split, "train", path.parent)
                assert all(map(torch.equal, found, self.codes))
        assert len(extracted) <= 1 or not path.is_file()  # the second time the cache is whole, if it can be written
        assert {entry.name for entry in path.parent.iterdir()} <= {path.name, "nothing"}
        return not extracted


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    return Valid(tmp_path_factory.mktemp("valid"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "codes-train.safetensors"  # a code cache's name, which a file of any other kind may have too


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a reader waits"))
    signal.alarm(120)
    yield
    signal.alarm(0)


def damaged(content: bytes, other: bytes, seed: str) -> list[bytes]:
    random = Random(seed)
    start = random.randrange(len(content))
    end = random.randint(start + 1, min(len(content), start + 200))
    before, middle, after = content[:start], content[start:end], content[end:]
    noise = random.randbytes(random.randint(1, 20))
    flipped = bytes([middle[0] ^ 1 << random.randrange(8)]) + middle[1:]
    middles = [flipped, noise, noise + middle, b"", 2 * middle, bytes(len(middle))]
    whole = [before, before + other[random.randrange(len(other)) :], after + middle + before]
    return [*(before + middle + after for middle in middles), *whole]


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_file_is_read_and_another_or_a_damaged_one_is_refused(path: Path, valid: Valid, kind: str) -> None:
    path.write_bytes(valid.files[kind])
    assert valid.believes(kind, path)
    for other in valid.files.keys() - {kind, "another vqvae"}:
        path.write_bytes(valid.files[other])
        assert not valid.believes(kind, path), other
    # Of a damaged file everything or nothing is believed.
    content, others = valid.files[kind], list(valid.files.values())
    spoilt = [wrong for i in range(2) for wrong in damaged(content, others[i], f"{kind} {i}") if wrong != content]
    spoilt += [content[:length] for length in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 65, len(content) - 1)]
    for wrong in spoilt:
        path.write_bytes(wrong)
        assert not valid.believes(kind, path) or kind == "recipe"  # a recipe may say something else


ODD_TOML = [b"-1", b"0", b"1e999", b"nan", b"true", b'""', b"'''x\ny'''", b"[1, 2]", b"{a = 1}", b"\xff", b"\0"]
ODD_TOML += [b"1979-05-27T07:32:00Z", b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 5000 + b"]" * 5000]
ODD_TOML += [b"{a." + b"a." * 400 + b"a = 1}", b'"' + b"x" * 5000 + b'"', b'"\\u001b[31m\\u202e"']


def test_no_setting_takes_an_odd_value(path: Path, valid: Valid) -> None:
    recipe = valid.files["recipe"]
    for line in (line for line in recipe.splitlines() if b" = " in line):
        for value in ODD_TOML:
            path.write_bytes(recipe.replace(line, line.split(b"=")[0] + b"= " + value))
            assert not valid.believes("recipe", path) or value in (b"0", b"true"), (line, value)


ODD_JSON = [None, True, -1, float("nan"), 10**400, "\ud800\x1b[31m\n\u202e", "x" * 5000, [], {"a": [1]}]


def forged(content: bytes, header: dict[str, Any]) -> bytes:
    """The checkpoint under another header, with the checksum that fits it."""
    text = json.dumps({**header, "checksum": hashlib.sha256(json.dumps(header).encode()).hexdigest()})
    return to_safetensors(from_safetensors(content), metadata={"header": text})


def lies(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in header.items():
        rest = {other: header[other] for other in header if other != name}
        yield from ({**header, name: odd} for odd in ODD_JSON)
        yield from (rest, {**rest, f"{name}_": value})


@pytest.mark.parametrize("kind", ["vqvae", "prior"])
def test_a_header_that_lies_is_refused_or_changes_nothing(path: Path, valid: Valid, kind: str) -> None:
    content, header = valid.files[kind], asdict(valid.headers[kind])
    path.write_bytes(forged(content, header))
    assert valid.believes(kind, path)
    nested = [{**header, part: lie} for part in ("config", "data") for lie in lies(header[part])]
    for lie in nested if kind == "vqvae" else [*lies(header), {**header, "format_version": 10**4000}]:
        path.write_bytes(forged(content, lie))
        valid.believes(kind, path)


ABSURD = [{"num_codes": 10**30}, {"code_dim": 10**9}, {"num_decoder_blocks": 10**9}]
ABSURD += [{"width": 2048, "num_encoder_blocks": 64, "num_decoder_blocks": 64}]  # 10 GB, and within every range
ABSURD += [{"image_shape": shape} for shape in ([1, 10**9, 8], [10**9, 8, 8], [3, 1024, 1024], [1, 30, 8], [1, 0, 8])]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_an_absurd_network_is_refused_before_memory_is_taken(path: Path, valid: Valid, change: dict[str, Any]) -> None:
    content, header = valid.files["vqvae"], asdict(valid.headers["vqvae"])
    for part in ("config", "data"):
        header[part] |= {name: value for name, value in change.items() if name in header[part]}
    description = {"config": header["config"], "data": header["data"]}
    for tensors in (from_safetensors(content), {}):
        path.write_bytes(forged(content, {**header, "fingerprint": fingerprint(description, tensors)}))
        assert not valid.believes("vqvae", path)


def test_a_file_as_long_as_it_says_is_refused_before_memory_is_taken(path: Path, valid: Valid) -> None:
    content = valid.files["vqvae"]
    end = 8 + int.from_bytes(content[:8], "little")
    table, start = json.loads(content[8:end]), len(content) - end - 1
    assert table["quantizer.initialised"]["data_offsets"] == [start, start + 1]
    table["quantizer.initialised"] |= {"shape": [2**30], "data_offsets": [start, start + 2**30]}
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    os.truncate(path, path.stat().st_size - 1 + 2**30)  # a hole of a gigabyte, which takes no space on the disk
    assert not valid.believes("vqvae", path)


def test_a_cache_of_other_codes_is_made_anew_even_if_its_hash_fits(path: Path, valid: Valid) -> None:
    codes = valid.codes.indices.short()
    others = [codes[:5], codes[:, :1], codes.flatten(), codes[..., None], codes.repeat(2, 1, 1), codes[:0]]
    others += [codes.index_fill(0, torch.tensor(row), code) for row in (0, 5) for code in (16, -1, 32767)]
    for wrong in others:
        valid.write_cache(path, wrong.contiguous())
        assert not valid.believes("codes", path)


def test_a_resume_state_that_lies_is_refused_or_plain_data(path: Path, valid: Valid) -> None:
    content = valid.files["resume"][:-64]
    start = content.index(b"\x80\x02")  # of the pickle, most of what can lie
    pickled, rest = content[start:].split(b"PK", 1)
    for lie in (lie for i in range(3) for lie in damaged(pickled, pickled, str(i))):
        forged = content[:start] + lie[: len(pickled)].ljust(len(pickled), b".") + b"PK" + rest
        path.write_bytes(forged + hashlib.sha256(forged).hexdigest().encode())
        valid.believes("any state", path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thing", [*THINGS, *LINKS])
def test_what_is_no_file_is_refused_at_once(path: Path, valid: Valid, kind: str, thing: str) -> None:
    THINGS[thing](path) if thing in THINGS else path.symlink_to(LINKS[thing])
    # An empty recipe departs from nothing.
    assert valid.believes(kind, path) == ((kind, thing) == ("recipe", "empty file"))
