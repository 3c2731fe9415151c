import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqvae.errors import InputError
from vqvae.storage.tensors import Streamed, TensorFile, checksum, write_streamed


def streamed(tensor: torch.Tensor, rows: int) -> Streamed:
    return Streamed(tensor.dtype, tuple(tensor.shape), tensor.split(rows))


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_what_is_written_in_pieces_is_read_and_mapped_as_a_whole(rows: int, tmp_path: Path) -> None:
    path, generator = tmp_path / "t.safetensors", torch.Generator().manual_seed(rows)
    shapes = {torch.int64: (7,), torch.float32: (7, 2), torch.int16: (7, 2, 3), torch.uint8: (7, 3, 4, 5)}
    tensors = {str(dtype): torch.randint(200, shapes[dtype], generator=generator).to(dtype) for dtype in shapes}
    write_streamed(path, {"origin": "ünïcode"}, {name: streamed(t, rows) for name, t in tensors.items()})
    with path.open("rb") as file:
        opened = TensorFile(file)
        mapped = opened.map()
    whole = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    assert opened.metadata == {"origin": "ünïcode", "checksum": hashlib.sha256(whole).hexdigest()}
    assert opened.metadata["checksum"] == checksum(tensors.values())
    for found in (mapped, load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


def test_pieces_that_do_not_make_up_the_whole_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for num in (4, 6):
        wrong = Streamed(torch.uint8, (5, 2), [torch.zeros(num, 2)])
        with pytest.raises(InputError, match="expected pieces of 10 bytes in all, found"):
            write_streamed(tmp_path / "t", {}, {"a": wrong})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_writing_hashing_and_mapping_need_no_memory_for_the_whole(tmp_path: Path) -> None:
    program = f"""
import resource, torch
from pathlib import Path
from vqvae.storage.tensors import *
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**27,) * 2)
path = Path({str(tmp_path / "t")!r})
piece = torch.ones(2**20, dtype=torch.uint8)
write_streamed(path, {{}}, {{"a": Streamed(torch.uint8, (2**29,), (piece for _ in range(2**9)))}})
with path.open("rb") as file:
    opened = TensorFile(file)
    tensors = opened.map()
assert opened.metadata["checksum"] == checksum(tensors.values())
assert tensors["a"][::2**20].sum() == 2**9
"""
    subprocess.run([sys.executable, "-c", program], check=True)
