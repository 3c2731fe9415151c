"""Sets that torchvision knows, without a network: small files take the originals' places, and a server here sends
them."""

import gzip
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, EMNIST, KMNIST

from tests.helpers import FIXTURE, ROOT
from vqvae.data import torchvision_sets
from vqvae.data.idx import FILES, to_idx
from vqvae.data.load import load_dataset
from vqvae.data.torchvision_sets import DEBIAN_FASHION, load_torchvision_set
from vqvae.errors import InputError, MissingFileError

Patch = pytest.MonkeyPatch
UNREACHABLE = "http://127.0.0.1:9/"  # nobody listens there


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx_files(seed: int = 0) -> dict[str, bytes]:
    """Four IDX files: 36 training and 12 test images, and labels of every class in turn."""
    random, arrays = np.random.default_rng(seed), []
    for num in (36, 12):
        arrays += [random.integers(256, size=(num, 28, 28), dtype=np.uint8), np.arange(num, dtype=np.uint8) % 10]
    return dict(zip(FILES, map(to_idx, arrays), strict=True))


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def packed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, 1, mtime=0) for name, content in files.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: Patch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: Patch) -> Iterator[tuple[Path, str]]:
    """A folder and the address where its files are."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    (folder := tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.02]).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: Patch) -> dict[str, bytes]:
    """Files that stand for the originals of Fashion-MNIST. They are neither installed nor to be downloaded."""
    files = idx_files()
    monkeypatch.setattr(torchvision_sets, "FASHION_MD5", {name: md5(content) for name, content in files.items()})
    monkeypatch.setattr(torchvision_sets, "DEBIAN_FASHION", tmp_path / "debian")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", [UNREACHABLE])
    return files


def test_fashion_mnist_is_read_where_debian_puts_it_and_nothing_is_written(
    fashion: dict[str, bytes], tmp_path: Path
) -> None:
    put(tmp_path / "debian", packed(fashion))  # packed by Debian: not the bytes that torchvision knows
    data = load_torchvision_set("fashion-mnist", tmp_path / "data", download=False)
    assert (data.info.name, data.info.image_shape) == ("fashion-mnist", (1, 28, 28))
    assert data.info.class_names[::9] == ("T-shirt/top", "Ankle boot")
    assert data.deformation.flips
    assert data.deformation.rotation == 0
    assert [len(part.labels) for part in (data.train, data.validation, data.load_test())] == [33, 3, 12]
    assert to_idx(data.load_test().images[:, 0].numpy()) == fashion["t10k-images-idx3-ubyte"]
    assert not (tmp_path / "data").exists()
    put(tmp_path / "data" / "FashionMNIST" / "raw", {"MD5SUMS": b"%032d  t10k-labels-idx1-ubyte\n" % 0})
    with pytest.raises(MissingFileError, match="all of them missing"):  # those of another set, not Debian's
        load_torchvision_set("fashion-mnist", tmp_path / "data", download=False)


def test_a_users_own_files_are_told_from_the_originals_and_stay(fashion: dict[str, bytes], tmp_path: Path) -> None:
    raw, own = tmp_path / "data" / "FashionMNIST" / "raw", idx_files(seed=1)
    put(tmp_path / "debian", packed(fashion))
    put(raw, own)
    for download in (False, True):
        with pytest.raises(
            InputError, match=r"which is the original's, found .* if it is right, add its sum to"
        ) as told:
            load_torchvision_set("fashion-mnist", tmp_path / "data", download)
        assert not any(word in str(told.value) for word in ("damaged", "delete", "remove"))
    assert contents(raw) == own
    put(raw, {"MD5SUMS": "".join(f"{md5(content)}  {name}\n" for name, content in own.items()).encode()})
    found = load_torchvision_set("fashion-mnist", tmp_path / "data", download=False).load_test()
    assert to_idx(found.images[:, 0].numpy()) == own["t10k-images-idx3-ubyte"]


@pytest.mark.usefixtures("fashion")
@pytest.mark.parametrize("download", [False, True])
def test_where_fashion_mnist_is_not_found_the_message_says_what_brings_it(tmp_path: Path, download: bool) -> None:
    why = "the mirrors .127.0.0.1: .*refused. brought nothing" if download else "`download=False` was given"
    message = f"four Fashion-MNIST files .*FashionMNIST/raw, .*{why}; .* apt-get install dataset-fashion-mnist$"
    with pytest.raises(MissingFileError, match=message) as told:
        load_torchvision_set("fashion-mnist", tmp_path, download)
    assert all(name in str(told.value) for name in FILES)


@pytest.fixture
def kmnist(server: tuple[Path, str], monkeypatch: Patch) -> dict[str, bytes]:
    """Files that stand for the originals of KMNIST. Only the sums of the packed ones are known. A mirror has them."""
    files = idx_files()
    put(server[0], packed(files))
    monkeypatch.setattr(KMNIST, "resources", [(name, md5(content)) for name, content in packed(files).items()])
    monkeypatch.setattr(KMNIST, "mirrors", [UNREACHABLE, server[1]])
    return files


def test_kmnist_is_kept_packed_as_its_sums_are_known(kmnist: dict[str, bytes], tmp_path: Path) -> None:
    raw, (first, *_) = tmp_path / "KMNIST" / "raw", kmnist
    put(raw, {f"{first}.gz": packed(kmnist)[f"{first}.gz"][:-20]})  # as by a download that was killed
    assert load_torchvision_set("kmnist", tmp_path).info.class_names[:3] == ("o", "ki", "su")
    assert contents(raw) == packed(kmnist)
    put(raw, kmnist)  # torchvision leaves both
    again = load_torchvision_set("kmnist", tmp_path, download=False)
    assert to_idx(again.load_test().images[:, 0].numpy()) == kmnist["t10k-images-idx3-ubyte"]
    put(raw, {f"{first}.gz": gzip.compress(kmnist[first], 9)})
    known, found = (md5(content) for content in (packed(kmnist)[f"{first}.gz"], gzip.compress(kmnist[first], 9)))
    with pytest.raises(InputError, match=f"expected MD5 {known} of {raw / first}.gz, .* found {found}; move the file"):
        load_torchvision_set("kmnist", tmp_path, download=False)


def test_a_file_whose_sum_cannot_be_compared_is_accepted_once_it_is_listed(
    kmnist: dict[str, bytes], tmp_path: Path
) -> None:
    put(raw := tmp_path / "KMNIST" / "raw", kmnist)
    first = FILES[0]
    message = f"expected {first}.gz in {raw}, whose MD5 is known, found {first} with MD5 {md5(kmnist[first])}, which "
    with pytest.raises(InputError, match=f"{message}cannot be compared; .* add its sum to an MD5SUMS file beside it"):
        load_torchvision_set("kmnist", tmp_path)
    put(raw, {"MD5SUMS": "".join(f"{md5(content)}  {name}\n" for name, content in kmnist.items()).encode()})
    assert len(load_torchvision_set("kmnist", tmp_path, download=False).train.labels) == 33


@pytest.mark.skipif(not DEBIAN_FASHION.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_files_are_the_originals(tmp_path: Path) -> None:
    data = load_torchvision_set("fashion-mnist", tmp_path, download=False)
    splits = data.train, data.validation, data.load_test()
    assert [part.images.shape for part in splits] == [(num, 1, 28, 28) for num in (55_000, 5_000, 10_000)]
    assert splits[2].labels.bincount().tolist() == [1_000] * 10


def letters(num_train: int = 52, num_test: int = 26, first: int = 1) -> dict[str, bytes]:
    """EMNIST's files of letters: in each image the first row is bright, as the files have it the first column."""
    files = {}
    for part, num in (("train", num_train), ("test", num_test)):
        images = np.zeros((num, 28, 28), np.uint8)
        images[:, :, 0] = 200
        labels = (np.arange(num) % 26 + first).astype(np.uint8)
        files[f"emnist-letters-{part}-images-idx3-ubyte"] = to_idx(images)
        files[f"emnist-letters-{part}-labels-idx1-ubyte"] = to_idx(labels)
    return files


def test_letters_stand_upright_and_are_numbered_from_a(tmp_path: Path) -> None:
    put(tmp_path / "EMNIST" / "raw", letters())
    data = load_torchvision_set("emnist-letters", tmp_path, download=False)
    assert (data.info.image_shape, "".join(data.info.class_names)) == ((1, 28, 28), "abcdefghijklmnopqrstuvwxyz")
    images, labels = data.load_test()
    assert (images.dtype, labels.tolist()) == (torch.uint8, list(range(26)))
    assert (images[:, 0, 0] == 200).all()
    assert (images[:, 0, 1:] == 0).all()
    assert sum(data.info.class_counts) == len(data.train.labels) == 48


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        (letters(first=0), "labels that are none of its 26 classes"),
        (letters(first=2), "labels that are none of its 26 classes"),
        (letters(num_test=11), "11 images and 11 labels"),
        (letters() | {"emnist-letters-test-images-idx3-ubyte": to_idx(np.zeros((26, 28, 28), np.uint8))[:-1]}, "Error"),
        (letters() | {"emnist-letters-train-labels-idx1-ubyte": to_idx(np.ones(30, np.uint8))}, "52 images and 30 la"),
    ],
    ids=range(5),
)
def test_letters_of_another_form_are_refused(tmp_path: Path, files: dict[str, bytes], cause: str) -> None:
    put(tmp_path / "EMNIST" / "raw", files)
    with pytest.raises(InputError, match=rf"EMNIST letters files in .*another kind \(.*{cause}.*\); move them away"):
        load_torchvision_set("emnist-letters", tmp_path)
    assert contents(tmp_path / "EMNIST" / "raw") == files


def batch(num: int, seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(256, size=(num, 3 * 32 * 32), dtype=np.uint8)
    return pickle.dumps({"data": data, "labels": [label % 10 for label in range(num)]})


@pytest.fixture
def cifar(monkeypatch: Patch) -> dict[str, bytes]:
    """Files that stand for the originals of CIFAR-10: six batches of 12 images, and the names of the classes."""
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    files = {name: batch(12, seed) for seed, name in enumerate(names)}
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {label}" for label in range(10)]})
    sums = [[name, md5(files[name])] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    monkeypatch.setattr(CIFAR10, "url", f"{UNREACHABLE}cifar.tar.gz")
    return files


def test_cifar10_is_in_colour_and_its_facts_are_the_files(cifar: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / CIFAR10.base_folder, cifar)
    data = load_torchvision_set("cifar10", tmp_path, download=False)
    assert (data.info.image_shape, data.info.class_names) == ((3, 32, 32), tuple(f"class {n}" for n in range(10)))
    assert [part.images.shape for part in (data.train, data.validation)] == [(55, 3, 32, 32), (5, 3, 32, 32)]
    images, labels = data.load_test()
    given = pickle.loads(cifar["test_batch"])
    assert (images.numpy().reshape(12, -1) == given["data"]).all()
    assert labels.tolist() == given["labels"]
    assert data.deformation.flips


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            (about := tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")).size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in packed(files | {"emnist-digits-test-labels-idx1-ubyte": b"of another split"}).items():
            archive.writestr(f"gzip/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("missing", ["", "data_batch_1"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_pickle_with_another_sum_is_never_opened_and_stays(
    cifar: dict[str, bytes], server: tuple[Path, str], tmp_path: Path, monkeypatch: Patch, name: str, missing: str
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "mark"), "w")

    put(server[0], {"archive.tar.gz": (archive := tar_of(cifar))})
    monkeypatch.setattr(CIFAR10, "url", f"{server[1]}archive.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    there = cifar | {name: pickle.dumps(Evil())}
    put(folder := tmp_path / CIFAR10.base_folder, {n: content for n, content in there.items() if n != missing})
    message = rf"CIFAR-10 files in {folder}, found some .*another kind \(.*: other MD5 sums than .*\); move them away"
    with pytest.raises(InputError, match=message):
        load_torchvision_set("cifar10", tmp_path)
    assert not (tmp_path / "mark").exists()
    assert contents(folder) == there


@pytest.mark.parametrize("name", ["emnist-letters", "cifar10"])
def test_torchvisions_download_leaves_the_files_and_nothing_else(
    name: str, cifar: dict[str, bytes], server: tuple[Path, str], tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    own, files, sum_name = (EMNIST, letters(), "md5") if name == "emnist-letters" else (CIFAR10, cifar, "tgz_md5")
    archive = zip_of(files) if own is EMNIST else tar_of(files)
    monkeypatch.setattr(own, "url", f"{server[1]}archive.{'zip' if own is EMNIST else 'tar.gz'}")
    monkeypatch.setattr(own, sum_name, md5(archive))
    folder = tmp_path / ("EMNIST/raw" if own is EMNIST else CIFAR10.base_folder)
    (folder / ".download.x.partial").mkdir(parents=True)  # as by a process that was killed
    for broken in (b"", archive[:-50]):
        put(server[0], {own.url.rpartition("/")[2]: broken})
        with pytest.raises(MissingFileError, match=r"missing, and torchvision's download failed \(.*\); either mend"):
            load_torchvision_set(name, tmp_path)
        assert contents(folder) == {}
    put(server[0], {own.url.rpartition("/")[2]: archive})
    kept = next(iter(files))
    put(folder, {kept: files[kept]})
    before = (folder / kept).stat().st_ino
    first = load_torchvision_set(name, tmp_path)
    assert contents(folder) == files
    assert (folder / kept).stat().st_ino == before  # what is there stays
    monkeypatch.setattr(own, "url", UNREACHABLE)
    again = load_torchvision_set(name, tmp_path, download=False)
    assert torch.equal(first.train.images, again.train.images)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["emnist-letters", "cifar10"])
def test_missing_files_are_named_with_their_folder_and_their_archive(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="found all of them missing, and `download=False` was given") as told:
        load_torchvision_set(name, tmp_path, download=False)
    own, file = (EMNIST, "emnist-letters-test-labels-idx1-ubyte") if "letters" in name else (CIFAR10, "batches.meta")
    assert all(text in str(told.value) for text in (file, str(tmp_path), own.url, "`data_folder`"))
    assert not list(tmp_path.iterdir())


def test_only_a_set_that_needs_torchvision_asks_for_it(tmp_path: Path, monkeypatch: Patch) -> None:
    program = "import sys; from vqvae.data.load import load_dataset; from pathlib import Path\n"
    program += "load_dataset('mnist', Path(sys.argv[1])); sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(FIXTURE)], cwd=ROOT, check=True)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        InputError, match="expected the package torchvision, which knows kmnist, found that it does not"
    ):
        load_torchvision_set("kmnist", tmp_path)


def test_colour_becomes_grey_by_luminance(cifar: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / CIFAR10.base_folder, cifar)
    grey = load_dataset("cifar10", tmp_path, channels=1).load_test().images.float()
    red, green, blue = load_dataset("cifar10", tmp_path).load_test().images.float().unbind(dim=1)
    expected = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    torch.testing.assert_close(grey, expected, rtol=0, atol=1)
