"""Files damaged in every way, thrown at every reader: each ends in one sentence, or in the right result.

"Right" is what the undamaged file gives, where a checksum or a fingerprint binds the content; where a person may
write another content (a recipe), or somebody forged the checksum too, it is what the file says, within its bounds.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tomllib
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

import prior.codes
from prior.codes import Codes, extract_cached
from prior.model import GatedPixelCNN, PriorConfig, load_prior
from prior.train import PriorTraining
from vqvae.common import checkpoint, data
from vqvae.common.checkpoint import load_resume_state, read_header, save_resume_state
from vqvae.common.config import read_recipe, resolve
from vqvae.common.data import MNIST_MD5, Split, load_test, load_train_and_validation, read_fallback_archive
from vqvae.common.errors import UserError
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae
from vqvae.train import VQVAETraining

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SECONDS = 20  # longer than any reader takes for these files on a busy machine

# How many different files each test throws at its reader.
THROWN = {
    "vqvae weights": 300,
    "vqvae weights, lying": 300,
    "prior weights": 200,
    "resume state": 250,
    "resume state, lying": 150,
    "data": 200,
    "data, lying": 200,
    "code cache": 200,
    "code cache, lying": 50,
    "recipe": 300,
    "archive": 100,
    "archive, lying": 250,
}


def test_two_thousand_damaged_files_are_thrown() -> None:
    assert sum(THROWN.values()) >= 2000


# --- Ways to damage a file


def flip(content: bytes, bits: list[int]) -> bytes:
    flipped = bytearray(content)
    for bit in bits:
        flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def damaged(content: bytes, others: list[bytes]) -> st.SearchStrategy[bytes]:
    """Files that are not the one that this was.

    Args:
        others: valid files, of which a part may stand in for a part of this one.
    """

    @st.composite
    def spoilt(draw: st.DrawFn) -> bytes:  # a closure, because hypothesis would print its arguments
        found = WAYS[draw(st.sampled_from(sorted(WAYS)))](draw, content, others)
        assume(found not in (content, *others))
        return found

    return spoilt()


def place(draw: st.DrawFn, content: bytes) -> int:
    return draw(st.integers(0, len(content)))


def span(draw: st.DrawFn, content: bytes) -> tuple[int, int]:
    start = draw(st.integers(0, len(content) - 1))
    return start, draw(st.integers(start + 1, min(len(content), start + 200)))


def with_middle(draw: st.DrawFn, content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    start, end = span(draw, content)
    return content[:start] + change(content[start:end]) + content[end:]


def noise(draw: st.DrawFn) -> bytes:
    return draw(st.binary(min_size=1, max_size=20))


def insert(draw: st.DrawFn, content: bytes, others: list[bytes]) -> bytes:
    at = place(draw, content)
    return content[:at] + noise(draw) + content[at:]


def swap(draw: st.DrawFn, content: bytes, others: list[bytes]) -> bytes:
    (a, b), (c, d) = sorted([span(draw, content), span(draw, content)])
    c, d = max(b, c), max(b, d)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def splice(draw: st.DrawFn, content: bytes, others: list[bytes]) -> bytes:
    other = others[draw(st.integers(0, len(others) - 1))]
    return content[: place(draw, content)] + other[place(draw, other) :]


def flip_some(draw: st.DrawFn, content: bytes, others: list[bytes]) -> bytes:
    return flip(content, draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)))


WAYS: dict[str, Callable[[st.DrawFn, bytes, list[bytes]], bytes]] = {
    "cut": lambda draw, content, _: content[: place(draw, content)],
    "flip": flip_some,
    "insert": insert,
    "overwrite": lambda draw, content, _: with_middle(draw, content, lambda middle: noise(draw)),
    "remove": lambda draw, content, _: with_middle(draw, content, lambda middle: b""),
    "repeat": lambda draw, content, _: with_middle(draw, content, lambda middle: 2 * middle),
    "zero": lambda draw, content, _: with_middle(draw, content, lambda middle: bytes(len(middle))),
    "swap": swap,
    "splice": splice,
}


def throw(name: str, files: st.SearchStrategy[bytes], read: Callable[[bytes], None]) -> None:
    """Read as many different files as the table says."""
    thrown = set()

    @settings(
        max_examples=THROWN[name],
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),  # a failing file is short enough to be looked at as it is
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def each(content: bytes) -> None:
        assume(content not in thrown)
        with time_limit():
            read(content)
        thrown.add(content)

    each()
    assert len(thrown) >= THROWN[name]


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """What is taken inside for a while, by Python as far as it counts, or by the process beyond its peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < num_bytes


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """A reader that waits for ever is a failure, and not a test run that never ends."""

    def give_up(*_: object) -> None:
        pytest.fail(f"not read within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def right_or_refused(read: Callable[[], Any], path: Path, right: Callable[[Any], bool]) -> bool:
    """Whether a file was read; what it gave was right then, and else a sentence named it."""
    try:
        found = read()
    except UserError as error:
        assert_sentence(str(error), path)
        return False
    assert right(found)
    return True


def assert_sentence(text: str, path: Path) -> None:
    assert str(path) in text
    assert re.search("expected .* found|expected to write|unknown key", text)
    assert len(text) < 1000
    assert text.isprintable()  # so on one line, too


# --- Valid files


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal bit for bit, tensors in them included."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return all(map(same, one, other))
    return type(one) is type(other) and one == other


def make_vqvae(seed: int) -> VQVAE:
    torch.manual_seed(seed)
    config = VQVAEConfig(2, 5, 4, 0, 0, "ema", image_size=8)
    model = VQVAE(config)
    model.train()(torch.rand(4, 1, 8, 8) * 2 - 1)  # the codebook has counts
    return model.eval()


def make_prior(seed: int) -> GatedPixelCNN:
    torch.manual_seed(seed)
    return GatedPixelCNN(PriorConfig(2, 1), 5, (2, 2)).eval()


def save(path: Path, model: VQVAE | GatedPixelCNN, of: str | None = None) -> checkpoint.Header:
    return checkpoint.save(
        path,
        model,
        stage="vqvae" if of is None else "prior",
        config=asdict(model.config),
        recipe={"lr": 2e-3, "seed": 3},
        metrics={"squared_error": 0.25, "perplexity": 4.5},
        vqvae_fingerprint=of,
    )


def make_split(num: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(10, (num,), generator=generator))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def make_data(raw: Path) -> None:
    """A data folder of twelve digits for training and twelve for testing."""
    raw.mkdir(parents=True)
    for seed, part in enumerate(("train", "t10k")):
        images, labels = make_split(12, seed)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images[:, 0].numpy()))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels.numpy()))
    seal_data(raw)


def seal_data(raw: Path) -> None:
    sums = [f"{hashlib.md5((raw / name).read_bytes()).hexdigest()}  {name}\n" for name in MNIST_MD5]
    (raw / "MD5SUMS").write_text("".join(sums))


def py2_string(content: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(content)) + content


def py2_array(array: np.ndarray) -> bytes:
    """Opcodes of an array, memo places included, as NumPy under Python 2 wrote them."""
    dtype = b"cnumpy\ndtype\nq\x05(" + py2_string(array.dtype.str[1:].encode()) + b"K\x00K\x01tR"
    dtype += b"(K\x03" + py2_string(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x01(cnumpy\nndarray\nq\x02(K\x00t" + py2_string(b"b") + b"tR"
    shape = b"(" + b"".join(b"M" + struct.pack("<H", size) for size in array.shape) + b"t"
    return made + b"(K\x01" + shape + dtype + b"\x89" + py2_string(array.tobytes()) + b"tb"


def make_opcodes() -> bytes:
    opcodes = b"\x80\x02("
    for seed in range(3):
        images, labels = make_split(1 + seed, seed)
        pixels = images.reshape(-1, 784).numpy().astype("<f4") / np.float32(256)
        opcodes += b"(" + py2_array(pixels) + py2_array(labels.numpy().astype("<i8")) + b"tq\x09"
    return opcodes + b"t."


def make_wheel(archive: bytes, member: str = data.FALLBACK_MEMBER) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("mnist/__init__.py", "raise SystemExit('run')\n")
        wheel.writestr(member, archive)
    return buffer.getvalue()


RECIPE = b"""# a comment
[vqvae]
hidden_size = 16
k = 512
codebook_learning = "ema"
ema_decay = 0.9
free_overshoot = true
lr = 2e-3
schedule = "one-cycle"

[prior]
num_layers = 7
dropout = 0.1
label_dropout = 0.1
batch_size = 64
"""


class Valid:
    """One valid file of every kind, and what each gives."""

    def __init__(self, folder: Path) -> None:
        self.vqvae, self.other_vqvae, self.prior = make_vqvae(0), make_vqvae(1), make_prior(2)
        self.header = save(folder / "vqvae", self.vqvae)
        other = save(folder / "other vqvae", self.other_vqvae)
        self.prior_header = save(folder / "prior", self.prior, of=self.header.fingerprint)
        save(folder / "prior of the other", make_prior(3), of=other.fingerprint)
        self.state = self.make_state()
        save_resume_state(folder / "resume", self.state)
        save_resume_state(folder / "other resume", {**self.state, "step": 4})
        self.split = make_split(6, 0)
        self.codes = Codes(torch.randint(5, (6, 2, 2)), self.split.labels)
        tensors = {"indices": self.codes.indices.short()}
        origin = {"vqvae": self.header.fingerprint, "data": data.digest(self.split)}
        metadata = {"fingerprint": checkpoint.fingerprint(origin, tensors)}
        (folder / "codes").write_bytes(to_safetensors(tensors, metadata=metadata))
        (folder / "images").write_bytes(idx(make_split(12, 0).images[:, 0].numpy()))
        (folder / "recipe").write_bytes(RECIPE)
        (folder / "archive").write_bytes(gzip.compress(make_opcodes()))
        (folder / "wheel").write_bytes(make_wheel((folder / "archive").read_bytes()))
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def make_state(self) -> dict[str, Any]:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        best = {"best": 0.5, "settings": {"lr": 1e-3, "kind": "ema"}}
        return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "step": 3, **best}

    def others(self, name: str) -> list[bytes]:
        return [content for other, content in self.files.items() if other != name]

    def damaged(self, name: str) -> st.SearchStrategy[bytes]:
        return damaged(self.files[name], self.others(name))


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    return Valid(tmp_path_factory.mktemp("valid"))


# --- The readers, each of a file at a path, with what is right


def read_vqvae(valid: Valid, path: Path) -> bool:
    def right(found: tuple[VQVAE, checkpoint.Header]) -> bool:
        return same(found[0].state_dict(), valid.vqvae.state_dict()) and found[1] == valid.header

    return right_or_refused(lambda: load_vqvae(path, CPU), path, right)


def read_prior(valid: Valid, path: Path) -> bool:
    def right(found: tuple[GatedPixelCNN, checkpoint.Header]) -> bool:
        return same(found[0].state_dict(), valid.prior.state_dict()) and found[1] == valid.prior_header

    return right_or_refused(lambda: load_prior(path, valid.vqvae, valid.header, CPU), path, right)


def read_resume(valid: Valid, path: Path) -> bool:
    return right_or_refused(lambda: load_resume_state(path), path, lambda found: same(found, valid.state))


def read_recipes(valid: Valid, path: Path) -> bool:
    """Both tables, resolved; right is what the file says, by types and ranges that a setting can have."""

    def read() -> list[tuple[dict[str, Any], list[Any]]]:
        tables = {stage: read_recipe(path, stage) for stage in ("vqvae", "prior")}
        classes = {"vqvae": (VQVAEConfig, VQVAETraining), "prior": (PriorConfig, PriorTraining)}
        return [(tables[stage], resolve(classes[stage], tables[stage], {}, path)) for stage in tables]

    def right(found: list[tuple[dict[str, Any], list[Any]]]) -> bool:
        says = tomllib.loads(path.read_bytes().decode())
        for (table, resolved), stage in zip(found, ("vqvae", "prior"), strict=True):
            assert table == says.get(stage, {})
            held = {f.name: getattr(instance, f.name) for instance in resolved for f in fields(instance)}
            assert all(held[key] == value for key, value in table.items())
            for instance in resolved:
                replace(instance)  # checks the ranges again
        return True

    return right_or_refused(read, path, right)


def read_codes(valid: Valid, path: Path) -> bool:
    """A cache that is not right is made anew: the codes are right always."""
    assert path.name == "codes-train.safetensors"
    extracted = []

    def extract(model: VQVAE, split: Split) -> Codes:
        extracted.append(True)
        return valid.codes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior.codes, "extract", extract)
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()):
                found = extract_cached(valid.vqvae, valid.header.fingerprint, valid.split, "train", path.parent)
            assert all(map(same, found, valid.codes))
        assert len(extracted) <= 1  # the second time it is whole
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return not extracted


def read_archive(valid: Valid, path: Path, right: Callable[[Any], bool]) -> bool:
    return right_or_refused(lambda: read_fallback_archive(path), path, right)


READERS = {"vqvae": read_vqvae, "prior": read_prior, "resume": read_resume, "recipe": read_recipes, "codes": read_codes}


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read(tmp_path: Path, valid: Valid, name: str) -> None:
    path = tmp_path / "codes-train.safetensors"
    path.write_bytes(valid.files[name])
    assert READERS[name](valid, path)


@pytest.mark.parametrize("name", READERS)
def test_another_valid_file_in_its_place_is_refused(tmp_path: Path, valid: Valid, name: str) -> None:
    path = tmp_path / "codes-train.safetensors"
    for other, content in valid.files.items():
        if other != name and (name, other) not in {("vqvae", "other vqvae"), ("resume", "other resume")}:
            path.write_bytes(content)
            assert not READERS[name](valid, path), other
    if name == "vqvae":  # another VQ-VAE is as good as this one, until a prior is put beside it
        path.write_bytes(valid.files["other vqvae"])
        model, header = load_vqvae(path, CPU)
        assert same(model.state_dict(), valid.other_vqvae.state_dict())
        prior_path = tmp_path / "prior"
        prior_path.write_bytes(valid.files["prior"])
        assert not right_or_refused(lambda: load_prior(prior_path, model, header, CPU), prior_path, lambda _: False)


# --- Damage, in bulk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reader"),
    [("vqvae weights", "vqvae"), ("prior weights", "prior"), ("resume state", "resume"), ("code cache", "codes")],
)
def test_of_a_damaged_file_everything_or_nothing_is_believed(
    tmp_path: Path, valid: Valid, name: str, reader: str
) -> None:
    path = tmp_path / "codes-train.safetensors"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        READERS[reader](valid, path)

    throw(name, valid.damaged(reader), read)


@pytest.mark.slow
def test_a_damaged_recipe_is_refused_or_says_what_may_be_said(tmp_path: Path, valid: Valid) -> None:
    path = tmp_path / "recipe.toml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_recipes(valid, path)

    shuffled = st.permutations(RECIPE.splitlines(keepends=True)).map(b"".join)
    throw("recipe", st.one_of(valid.damaged("recipe"), valid.damaged("recipe"), shuffled), read)


def test_no_setting_takes_an_odd_value(tmp_path: Path, valid: Valid) -> None:
    path = tmp_path / "recipe.toml"
    for line in RECIPE.splitlines():
        for value in ODD_TOML:
            path.write_bytes(RECIPE.replace(line, line.split(b"=")[0] + b"= " + value))
            with time_limit():
                read_recipes(valid, path)


ODD_TOML = [
    b"-1",
    b"0",
    b"1e999",
    b"nan",
    b"-inf",
    b"true",
    b'""',
    b"'''x\ny'''",
    b"[1, 2]",
    b"{a = 1}",
    b"1979-05-27T07:32:00Z",
    b"9" * 400,
    b"9" * 5000,
    b"0x" + b"f" * 5000,
    b"[" * 5000 + b"]" * 5000,
    b"{a." + b"a." * 400 + b"a = 1}",
    b'"' + b"x" * 5000 + b'"',
    b'"\\u001b[31m\\u202e"',
    b"\xff",
    b"\0",
]


# --- Headers that lie: well-formed files whose fields are not what they should be, with no checksum to give them away


ODD_JSON = [
    "null",
    "true",
    "-1",
    "0",
    "3.5",
    "NaN",
    "1e999",
    "1" + "0" * 400,
    "9" * 5000,
    "1000000000",
    '""',
    '"x"',
    '"\\ud800\\u001b[31m\\n"',
    '"' + "x" * 5000 + '"',
    "[]",
    "{}",
    '{"a": {"b": [1]}}',
    "[" * 2000 + "]" * 2000,
    "[" * 100_000 + "]" * 100_000,
]


def taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The table of a safetensors file and its data."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def put_together(table: dict[str, Any], content: bytes) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + content


def as_json(texts: dict[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in texts.items()) + "}"


def lying_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A checkpoint whose own header or its configuration has one field changed, or two that changed places."""
    table, tensors = taken_apart(content)
    header = json.loads(table["__metadata__"]["header"])
    del header["checksum"]
    config = {name: json.dumps(value) for name, value in header["config"].items()}
    texts = {name: json.dumps(value) for name, value in header.items()}
    changed = draw(st.sampled_from([texts, config]))
    one, other = draw(st.permutations(list(changed)))[:2]
    way = draw(st.sampled_from(["set", "set", "set", "swap", "drop", "rename"]))
    if way == "set":
        changed[one] = draw(st.sampled_from(ODD_JSON))
    elif way == "swap":
        changed[one], changed[other] = changed[other], changed[one]
    elif way == "drop":
        del changed[one]
    else:
        changed[f"{one}_"] = changed.pop(one)
    if changed is config:
        texts["config"] = as_json(config)
    return put_together({**table, "__metadata__": {"header": as_json(texts)}}, tensors)


def lying_table(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose table of tensors is changed, in one entry or between two."""
    table, tensors = taken_apart(content)
    names = draw(st.permutations([name for name in table if name != "__metadata__"]))
    one, other = names[0], names[-1]
    size = len(tensors)
    changes: list[tuple[str, Any]] = [
        ("dtype", draw(st.sampled_from(["F64", "F16", "BF16", "I32", "BOOL", "U8", "F8_E4M3", "F4", "C64", "x", 3]))),
        ("shape", draw(st.sampled_from([[], [0], [10**12], [2**63], [-1], [1] * 70, [2**32, 2**32], "x", None]))),
        (
            "data_offsets",
            draw(st.sampled_from([[0, size], [size, 0], [0, 10**12], [-1, 4], [0], [2**64, 2**64], None])),
        ),
    ]
    way = draw(st.sampled_from(["entry", "swap", "rename", "drop", "metadata", "append", "repeat"]))
    if way == "entry":
        key, value = draw(st.sampled_from(changes))
        table[one][key] = value
    elif way == "swap":
        table[one], table[other] = table[other], table[one]
    elif way == "rename":
        table[draw(st.text(max_size=20))] = table.pop(one)
    elif way == "drop":
        del table[one]
    elif way == "metadata":
        table["__metadata__"] = draw(st.sampled_from([None, {}, {"header": ""}, {"header": 3}, {"fingerprint": "0"}]))
    elif way == "append":
        table["more"] = {"dtype": "U8", "shape": [8], "data_offsets": [size, size + 8]}
        tensors += bytes(8)
    else:
        table["more"] = table[one]
    return put_together(table, tensors)


def lying(content: bytes, *lies: Callable[[st.DrawFn, bytes], bytes]) -> st.SearchStrategy[bytes]:
    @st.composite
    def told(draw: st.DrawFn) -> bytes:
        return lies[draw(st.integers(0, len(lies) - 1))](draw, content)

    return told()


@pytest.mark.slow
def test_a_checkpoint_that_lies_is_refused_or_gives_its_own_weights(tmp_path: Path, valid: Valid) -> None:
    path = tmp_path / "vqvae.safetensors"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        right_or_refused(lambda: load_vqvae(path, CPU), path, right)

    def right(found: tuple[VQVAE, checkpoint.Header]) -> bool:
        model, header = found  # what is only for the record may say anything of its type
        assert isinstance(header.recipe, dict)
        assert isinstance(header.metrics, dict)
        assert (header.config, header.fingerprint) == (valid.header.config, valid.header.fingerprint)
        return same(model.state_dict(), valid.vqvae.state_dict())

    throw("vqvae weights, lying", lying(valid.files["vqvae"], lying_header, lying_table), read)


@pytest.mark.slow
def test_a_code_cache_that_lies_is_made_anew(tmp_path: Path, valid: Valid) -> None:
    path = tmp_path / "codes-train.safetensors"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_codes(valid, path)

    origin = {"vqvae": valid.header.fingerprint, "data": data.digest(valid.split)}

    def with_its_hash(indices: torch.Tensor) -> bytes:
        """Codes that nothing but their values gives away."""
        metadata = {"fingerprint": checkpoint.fingerprint(origin, {"indices": indices})}
        return to_safetensors({"indices": indices}, metadata=metadata)

    codes = valid.codes.indices.short()
    others = [codes[:5], codes[:, :1], codes.flatten(), codes[..., None], codes.repeat(2, 1, 1), codes[:0]]
    others += [codes.index_fill(0, torch.tensor(row), code) for row in range(6) for code in (5, -1, 32767)]
    files = [with_its_hash(wrong.contiguous()) for wrong in others]
    wrong = st.integers(0, len(files) - 1).map(files.__getitem__)
    throw("code cache, lying", st.one_of(lying(valid.files["codes"], lying_table), wrong), read)


@pytest.mark.parametrize(
    "change",
    [
        {"k": 10**9},
        {"k": 10**30},
        {"hidden_size": 10**9},
        {"width": 2048, "num_encoder_blocks": 64, "num_decoder_blocks": 64},  # 10 GB, and within every range
        {"num_decoder_blocks": 10**9},
        {"image_size": 10**9},
        {"image_size": 30},
        {"width": 4.0},
        {"k": True},
        {"ema_decay": float("nan")},
        {"codebook_learning": "exec"},
    ],
    ids=str,
)
def test_a_network_that_is_absurd_is_refused_before_memory_is_taken(
    tmp_path: Path, valid: Valid, change: dict[str, Any]
) -> None:
    table, tensors = taken_apart(valid.files["vqvae"])
    header = json.loads(table["__metadata__"]["header"])
    config = {**header["config"], **change}
    fingerprint = checkpoint.fingerprint(config, from_safetensors(valid.files["vqvae"]))  # a lie that is consistent
    forged = {**header, "config": config, "fingerprint": fingerprint}
    del forged["checksum"]
    path = tmp_path / "vqvae.safetensors"
    path.write_bytes(put_together({**table, "__metadata__": {"header": json.dumps(forged)}}, tensors))
    with memory_limit(2**26):
        assert not right_or_refused(lambda: load_vqvae(path, CPU), path, lambda _: False)


def test_a_file_as_long_as_the_absurd_network_is_refused_before_memory_is_taken(tmp_path: Path, valid: Valid) -> None:
    table, tensors = taken_apart(valid.files["vqvae"])
    last = max((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"][1])
    entry = table[last]
    assert entry["dtype"] == "BOOL"
    entry["shape"] = [2**30]
    entry["data_offsets"][1] = entry["data_offsets"][0] + 2**30
    path = tmp_path / "vqvae.safetensors"
    path.write_bytes(put_together(table, tensors))
    with path.open("r+b") as file:  # a hole of a gigabyte, which takes no space on the disk
        file.truncate(path.stat().st_size - len(tensors) + entry["data_offsets"][1])
    with time_limit(), memory_limit(2**26):
        assert not right_or_refused(lambda: load_vqvae(path, CPU), path, lambda _: False)


@pytest.mark.parametrize("old", ['seed\\": 3', 'squared_error\\": 0.25', 'stage\\": \\"vqvae', "null", '"ema_decay'])
def test_one_changed_character_of_the_header_is_noticed(tmp_path: Path, valid: Valid, old: str) -> None:
    content = valid.files["vqvae"]
    end = content.index(old.encode()) + len(old)
    path = tmp_path / "vqvae.safetensors"
    path.write_bytes(content[: end - 1] + bytes([content[end - 1] ^ 1]) + content[end:])
    assert not read_vqvae(valid, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = make_vqvae(0)
    model.quantizer.codebook[1, 1] = value
    save(tmp_path / "vqvae.safetensors", model)
    with pytest.raises(UserError, match=r"expected finite weights in .*vqvae.safetensors, found quantizer.codebook"):
        load_vqvae(tmp_path / "vqvae.safetensors", CPU)


def test_weights_that_were_loaded_do_not_change_with_the_file(tmp_path: Path, valid: Valid) -> None:
    path = tmp_path / "vqvae.safetensors"
    path.write_bytes(valid.files["vqvae"])
    model, _ = load_vqvae(path, CPU)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(model.state_dict(), valid.vqvae.state_dict())


# --- Resume state


def sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).hexdigest().encode()


@pytest.mark.slow
def test_resume_state_that_lies_is_refused_or_plain_data(tmp_path: Path, valid: Valid) -> None:
    path = tmp_path / "resume.pt"

    def read(content: bytes) -> None:
        path.write_bytes(sealed(content))
        right_or_refused(lambda: load_resume_state(path), path, lambda found: type(found) is dict)

    content = valid.files["resume"][:-64]
    start = content.index(b"\x80\x02")  # the pickle: most of what can lie
    end = content.index(b"PK", start)
    pickled = damaged(content[start:end], [content[start:end]]).map(
        lambda lie: content[:start] + lie[: end - start].ljust(end - start, b".") + content[end:]
    )
    throw("resume state, lying", st.one_of(pickled, damaged(content, [content])).filter(content.__ne__), read)


def test_resume_state_that_is_packed_is_refused_unread(tmp_path: Path, valid: Valid) -> None:
    """A megabyte could hold a gigabyte."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(valid.files["resume"])) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    path = tmp_path / "resume.pt"
    path.write_bytes(sealed(buffer.getvalue()))
    with pytest.raises(UserError, match="packed entries"):
        load_resume_state(path)


# --- Data


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    make_data(tmp_path / "MNIST" / "raw")
    return tmp_path / "MNIST" / "raw"


def read_data(raw: Path, right: Callable[[Any], bool]) -> bool:
    folder = raw.parents[1]

    def read() -> tuple[Split, Split, Split]:
        return (*load_train_and_validation(folder, download=False), load_test(folder, download=False))

    return right_or_refused(read, raw, right)


@pytest.mark.slow
def test_damaged_data_is_refused(raw: Path, valid: Valid) -> None:
    whole = {path.name: path.read_bytes() for path in raw.iterdir()}
    read_right = (*load_train_and_validation(raw.parents[1], False), load_test(raw.parents[1], False))
    places = st.sampled_from(sorted(whole))
    files = places.flatmap(
        lambda name: damaged(whole[name], [*whole.values(), RECIPE]).map(lambda spoilt: name.encode() + b"\n" + spoilt)
    )

    def read(named: bytes) -> None:
        name, _, content = named.partition(b"\n")
        (raw / name.decode()).write_bytes(content)
        read_data(raw, lambda found: same(found, read_right))
        (raw / name.decode()).write_bytes(whole[name.decode()])

    throw("data", files, read)


@pytest.mark.slow
def test_data_that_lies_is_refused_or_read_as_it_is(raw: Path) -> None:
    """The sums fit, so that nothing but the header's own checks stands between the file and the training."""
    whole = {name: (raw / name).read_bytes() for name in MNIST_MD5}

    def header(name: str) -> st.SearchStrategy[bytes]:
        num = 4 if "idx3" in name else 2
        sizes = st.sampled_from([0, 1, 11, 12, 13, 28, 784, 2**31 - 1, 2**31, 2**32 - 1, 0x801, 0x803, 0xD03])
        return st.lists(sizes, min_size=num, max_size=num).map(
            lambda values: struct.pack(f">{num}I", *values) + whole[name][4 * num :]
        )

    files = st.sampled_from(sorted(whole)).flatmap(
        lambda name: st.one_of(damaged(whole[name], list(whole.values())), header(name)).map(
            lambda spoilt: name.encode() + b"\n" + spoilt
        )
    )

    def right(found: tuple[Split, Split, Split]) -> bool:
        train, validation, test = found
        for part, splits in (("train", (train, validation)), ("t10k", (test,))):
            images, labels = ((raw / f"{part}-{kind}-ubyte").read_bytes() for kind in ("images-idx3", "labels-idx1"))
            num = sum(len(split.labels) for split in splits)
            assert int.from_bytes(images[4:8], "big") == int.from_bytes(labels[4:8], "big") == num >= 12
            pixels = [image.numpy().tobytes() for split in splits for image in split.images]
            given = [images[16 + 784 * i :][:784] for i in range(num)]
            assert sorted(pixels) == sorted(given)
            assert sorted(int(label) for split in splits for label in split.labels) == sorted(labels[8:])
            assert max(labels[8:]) <= 9
            assert len(splits[0].labels) > 0
        return True

    def read(named: bytes) -> None:
        name, _, content = named.partition(b"\n")
        (raw / name.decode()).write_bytes(content)
        seal_data(raw)
        read_data(raw, right)
        (raw / name.decode()).write_bytes(whole[name.decode()])

    throw("data, lying", files, read)


@pytest.mark.parametrize("shape", [(0,), (0, 28, 28), (12, 28, 0), (0, 2**32 - 1, 2**32 - 1)])
def test_data_without_any_is_refused(raw: Path, shape: tuple[int, ...]) -> None:
    name = "t10k-images-idx3-ubyte" if len(shape) == 3 else "t10k-labels-idx1-ubyte"
    (raw / name).write_bytes(struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape))
    seal_data(raw)
    assert not read_data(raw, lambda _: False)


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("floats", "its header does not fit"),
        ("one axis less", "its header does not fit"),
        ("a byte more", "its header does not fit"),
        ("a byte less", "its header does not fit"),
        ("eleven", "at least 12, .* found images of shape .*11"),
        ("not square", "images of 28x28, .* found images of shape .*14, 56"),
        ("a label of ten", "a label from 0 to 9"),
    ],
)
def test_data_of_another_shape_is_refused(raw: Path, part: str, change: str, says: str) -> None:
    images, labels = make_split(12, 0)
    pixels, digits = images[:, 0].numpy(), labels.numpy()
    if change == "eleven":
        pixels, digits = pixels[:11], digits[:11]
    elif change == "not square":
        pixels = pixels.reshape(12, 14, 56)
    elif change == "a label of ten":
        digits[3] = 10
    content = {
        "floats": b"\0\0\x0d" + idx(pixels)[3:],
        "one axis less": b"\0\0\x08\x02" + idx(pixels)[4:],
        "a byte more": idx(pixels) + b"\0",
        "a byte less": idx(pixels)[:-1],
    }.get(change, idx(pixels))
    (raw / f"{part}-images-idx3-ubyte").write_bytes(content)
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(digits))
    seal_data(raw)
    with pytest.raises(UserError, match=says) as error:
        (load_train_and_validation if part == "train" else load_test)(raw.parents[1], download=False)
    assert_sentence(str(error.value), raw)


def test_other_files_of_the_folder_in_the_place_of_one_are_refused(raw: Path) -> None:
    whole = {name: (raw / name).read_bytes() for name in MNIST_MD5}
    for name in whole:
        for other, content in whole.items():
            # Test images under training labels are well-formed; only a sum can tell.
            if other != name:
                (raw / name).write_bytes(content)
                assert not read_data(raw, lambda _: False)
        (raw / name).write_bytes(whole[name])


def test_what_torchvision_once_cached_is_not_read(raw: Path) -> None:
    """torchvision prefers a folder `processed`, which nothing checks."""
    processed = raw.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(12, 28, 28, dtype=torch.uint8), torch.zeros(12, dtype=torch.int64)), processed / name)
    assert load_test(raw.parents[1], download=False).images.any()


# --- The fallback archive


def is_digits(parts: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    return len(parts) == 3 and all(
        images.dtype == labels.dtype == np.uint8 and images.shape == (len(labels), 28, 28) and labels.max() <= 9
        for images, labels in parts
    )


@pytest.mark.slow
def test_a_damaged_archive_or_wheel_is_refused(tmp_path: Path, valid: Valid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FALLBACK_SHA256", hashlib.sha256(valid.files["archive"]).hexdigest())
    archive, wheel = tmp_path / "mnist.pkl.gz", tmp_path / "mnist.whl"

    def read(content: bytes) -> None:
        wheel.write_bytes(content)
        if right_or_refused(lambda: archive.write_bytes(data._member(wheel)), wheel, lambda _: True):
            right_or_refused(lambda: read_fallback_archive(archive), archive, is_right)
        assert sorted(tmp_path.rglob("*")) <= [archive, wheel]

    def is_right(found: list[tuple[np.ndarray, np.ndarray]]) -> bool:
        return all(
            np.array_equal(array, expected)
            for part, seed in zip(found, range(3), strict=True)
            for array, expected in zip(part, (images[seed][:, 0], labels[seed]), strict=True)
        )

    images, labels = zip(*(make_split(1 + seed, seed) for seed in range(3)), strict=True)
    archive.write_bytes(valid.files["archive"])
    assert is_right(read_fallback_archive(archive))
    spoilt = valid.damaged("archive")
    throw("archive", st.one_of(valid.damaged("wheel"), spoilt.map(make_wheel)), read)


@pytest.mark.slow
def test_an_archive_that_lies_is_refused_or_holds_digits(
    tmp_path: Path, valid: Valid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash fits, so that nothing but the guarded unpickler stands between the file and the machine."""
    opcodes = make_opcodes()
    path = tmp_path / "mnist.pkl.gz"
    monkeypatch.setattr(data, "MAX_UNPACKED", 2 * len(opcodes))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        monkeypatch.setattr(data, "FALLBACK_SHA256", hashlib.sha256(content).hexdigest())
        right_or_refused(lambda: read_fallback_archive(path), path, is_digits)

    # The pixels are long and can hardly lie: most of the damage goes to what is around them.
    spans = [(start, start + 120) for start in (0, len(opcodes) - 250, len(opcodes) - 120)]
    around = st.sampled_from(spans).flatmap(
        lambda span: damaged(opcodes[slice(*span)], [opcodes[:120]]).map(
            lambda spoilt: opcodes[: span[0]] + spoilt + opcodes[span[1] :]
        )
    )
    packed = st.one_of(around, around, damaged(opcodes, [opcodes])).map(lambda lie: gzip.compress(lie, 1, mtime=0))
    throw("archive, lying", st.one_of(packed, packed, valid.damaged("archive")), read)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"T\xff\xff\xff\x7f",  # a string of two gigabytes
        b"Nr\x00\x00\x00\x04.",  # the 67 millionth place of the memo: a gigabyte, in a list
        b"\x8e" + b"\xff" * 7 + b"\x7f",  # bytes of an eight-byte length
        b"\x8b\xff\xff\xff\x7f1",  # a whole number of two gigabytes
        b"\x95" + b"\xff" * 7 + b"\x7f",  # a frame
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"cnumpy\ndtype\n(U\x01OK\x00K\x01tR.",  # of objects, which would be pointers in the data
        b"cnumpy\ndtype\n(U\x0bS2000000000K\x00K\x01tR.",
        b"cnumpy\nndarray\n(\x8a\x06\x00\x00\x00\x00\x00\x01\x85U\x02f4tR.",
        b"\x82\x01.",  # a registered extension
        b"U\x01xQ.",  # a persistent name
        b"i",
        b".",
        b"",
    ],
)
def test_a_pickle_that_asks_for_the_absurd_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opcodes: bytes
) -> None:
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(b"\x80\x02" + opcodes))
    monkeypatch.setattr(data, "FALLBACK_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with time_limit(), memory_limit(2**26):
        assert not right_or_refused(lambda: read_fallback_archive(path), path, lambda _: False)


def test_an_archive_of_another_byte_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(make_opcodes().replace(py2_string(b"<"), py2_string(b">"))))
    monkeypatch.setattr(data, "FALLBACK_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="numbers of another byte order"):
        read_fallback_archive(path)


@pytest.mark.parametrize("bomb", ["archive", "member", "wheel"])
def test_what_would_unpack_to_more_than_there_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    path = tmp_path / "file"
    zeros = gzip.compress(b"\x80\x02T\xff\xff\xff\x7f" + bytes(2**26), 1)
    monkeypatch.setattr(data, "MAX_UNPACKED", 2**20)
    monkeypatch.setattr(data, "MAX_ARCHIVE", 2**20)
    monkeypatch.setattr(data, "FALLBACK_SHA256", hashlib.sha256(zeros).hexdigest())
    path.write_bytes({"archive": zeros, "member": make_wheel(bytes(2**26)), "wheel": b"PK" + bytes(2**21)}[bomb])
    read = read_fallback_archive if bomb == "archive" else data._member
    with time_limit(), memory_limit(2**23):
        assert not right_or_refused(lambda: read(path), path, lambda _: False)


@pytest.mark.parametrize("member", ["../evil", "/tmp/evil", f"../{data.FALLBACK_MEMBER}", "mnist/data/../evil"])
def test_a_member_of_a_wheel_goes_to_no_path(tmp_path: Path, member: str) -> None:
    wheel = tmp_path / "folder" / "mnist.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(make_wheel(b"x", member))
    assert not right_or_refused(lambda: data._member(wheel), wheel, lambda _: False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [wheel]


# --- What is no file


def put(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to nothing":
        path.symlink_to(path.parent / "nothing")
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_bytes(b"")


KINDS = ["pipe", "folder", "device", "link to nothing", "link to itself", "empty"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vqvae", "prior", "resume", "archive"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, valid: Valid, name: str, kind: str) -> None:
    path = tmp_path / "file"
    put(path, kind)
    with time_limit():
        if name == "archive":
            assert not read_archive(valid, path, lambda _: False)
        else:
            assert not READERS[name](valid, path)


@pytest.mark.parametrize("kind", KINDS[:-1])  # an empty recipe is one that departs from nothing
def test_what_is_no_recipe_is_refused_at_once(tmp_path: Path, valid: Valid, kind: str) -> None:
    put(tmp_path / "recipe.toml", kind)
    with time_limit():
        assert not read_recipes(valid, tmp_path / "recipe.toml")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "MD5SUMS"])
def test_what_is_no_data_is_refused_at_once(raw: Path, name: str, kind: str) -> None:
    (raw / name).unlink()
    put(raw / name, kind)
    with time_limit():
        assert not read_data(raw, lambda _: False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_code_cache_is_replaced_or_refused_at_once(tmp_path: Path, valid: Valid, kind: str) -> None:
    path = tmp_path / "codes-train.safetensors"
    put(path, kind)
    with time_limit():
        if kind == "folder":  # which nothing replaces
            assert not right_or_refused(lambda: read_codes(valid, path), path, lambda _: False)
        else:
            assert not read_codes(valid, path)
            assert read_codes(valid, path)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000 + "a"])
def test_a_path_too_long_is_refused(tmp_path: Path, name: str) -> None:
    for read in (lambda path: read_header(path, "vqvae"), load_resume_state, lambda path: read_recipe(path, "vqvae")):
        with pytest.raises(UserError, match="found what can't be read: File name too long"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="expected the four MNIST files"):
        load_test(tmp_path / name, download=False)
    with pytest.raises(UserError, match="File name too long"):
        load_test(tmp_path / name)


# --- Through the command line


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["weights", "pipe", "recipe", "data", "resume state"])
def test_a_command_that_meets_a_damaged_file_ends_in_a_sentence(tmp_path: Path, valid: Valid, broken: str) -> None:
    output = tmp_path / "out.png"
    smoke = [
        "--config",
        str(ROOT / "configs" / "smoke.toml"),
        "--no-download",
        "--output-folder",
        str(tmp_path / "run"),
    ]
    if broken in ("weights", "pipe"):
        path = tmp_path / "vqvae.safetensors"
        path.write_bytes(flip(valid.files["vqvae"], [8 * len(valid.files["vqvae"]) - 100]))
        if broken == "pipe":
            path.unlink()
            os.mkfifo(path)
        command = ["sample", "--mode", "gaussian", "--vqvae", str(path), "--output", str(output)]
    elif broken == "recipe":
        path = tmp_path / "recipe.toml"
        path.write_bytes(RECIPE.replace(b"2e-3", b"[" * 5000))
        command = ["train-vqvae", "--config", str(path), "--output-folder", str(tmp_path / "run")]
    elif broken == "data":
        path = tmp_path / "MNIST" / "raw"
        shutil.copytree(ROOT / "tests" / "fixture", tmp_path, dirs_exist_ok=True)
        (path / "t10k-images-idx3-ubyte").write_bytes(b"\0")
        command = ["train-vqvae", *smoke, "--data-folder", str(tmp_path)]
    else:
        path = tmp_path / "run" / "vqvae" / "resume.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(valid.files["resume"][:-70])
        command = ["train-vqvae", *smoke, "--data-folder", str(ROOT / "tests" / "fixture"), "--resume"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert_sentence(done.stderr.removesuffix("\n"), path)
    assert not output.exists()
    assert list(tmp_path.rglob("*.safetensors")) == ([path] if broken in ("weights", "pipe") else [])
