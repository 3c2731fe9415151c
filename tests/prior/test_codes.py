"""Code maps of a split: what is extracted, and when the cache on disk is used."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import prior.codes
from prior.codes import Codes, extract, extract_cached
from tests.helpers import make_split, make_vqvae
from vqvae import codec
from vqvae.data.dataset import Split
from vqvae.data.pixels import to_model_range
from vqvae.model import VQVAE


def make_spread_vqvae(seed: int = 0, num_codes: int = 512) -> VQVAE:
    """A VQ-VAE with codes where the encoder's vectors are, so that many are chosen."""
    vqvae = make_vqvae(seed=seed, num_codes=num_codes)
    with torch.no_grad():
        z_e = vqvae.encode_continuous(to_model_range(make_split(num_codes // 49 + 1).images))
        vqvae.quantizer.codebook.copy_(z_e.permute(0, 2, 3, 1).flatten(0, 2)[:num_codes])
    return vqvae


def equal(one: Codes, other: Codes) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def fail(*_: object) -> Codes:
    raise AssertionError("extracted anew")


def test_codes_are_those_of_each_image_alone_under_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "BATCH", 7)
    vqvae, split = make_spread_vqvae(), make_split(23)
    codes = extract(vqvae, split)
    assert (codes.indices.shape, codes.indices.dtype) == ((23, 7, 7), torch.int64)
    assert torch.equal(codes.labels, split.labels)
    with torch.no_grad():
        x = (split.images.double() / 255 * 2 - 1).float()
        alone = torch.cat([vqvae.encode(x[n : n + 1]) for n in range(23)])
    assert (alone == codes.indices).double().mean() > 0.99  # all but ties up to rounding
    assert codes.indices.unique().numel() > 100
    table = torch.zeros(512, 3, requires_grad=True)
    torch.nn.functional.embedding(codes.indices, table).sum().backward()  # they can be trained on


def test_extraction_changes_nothing_of_a_model_in_training_and_restores_its_mode() -> None:
    vqvae = make_vqvae().train()
    vqvae.decoder.eval()
    before = {name: tensor.clone() for name, tensor in vqvae.state_dict().items()}
    extract(vqvae, make_split(5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vqvae.state_dict().items())
    assert vqvae.encoder.training
    assert not vqvae.decoder.training


def test_the_cache_gives_back_each_splits_codes_without_extracting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqvae, splits = make_spread_vqvae(), {"train": make_split(23), "validation": make_split(5, seed=1)}
    first = {name: extract_cached(vqvae, "f" * 64, split, name, tmp_path) for name, split in splits.items()}
    assert first["train"].indices.max() > 255  # more than a byte holds
    assert {path.name for path in tmp_path.iterdir()} == {"codes-train.safetensors", "codes-validation.safetensors"}
    assert all(equal(first[name], extract(vqvae, split)) for name, split in splits.items())
    monkeypatch.setattr(prior.codes, "extract", fail)
    for name, split in splits.items():
        assert equal(extract_cached(vqvae, "f" * 64, split, name, tmp_path), first[name])


def test_the_largest_number_of_codes_survives_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    highest, vqvae = Codes(torch.full((1, 7, 7), 32766), torch.tensor([0])), make_vqvae(num_codes=32767)
    monkeypatch.setattr(prior.codes, "extract", lambda *_: highest)
    extract_cached(vqvae, "f", make_split(1), "train", tmp_path)
    monkeypatch.setattr(prior.codes, "extract", fail)
    assert equal(extract_cached(vqvae, "f", make_split(1), "train", tmp_path), highest)


def test_a_cache_of_another_vqvae_is_not_used_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, split = make_spread_vqvae(0), make_spread_vqvae(1), make_split(23)
    stale = extract_cached(one, "one", split, "train", tmp_path)
    fresh = extract_cached(other, "other", split, "train", tmp_path)
    assert not equal(fresh, stale)
    assert equal(fresh, extract(other, split))
    monkeypatch.setattr(prior.codes, "extract", fail)
    assert equal(extract_cached(other, "other", split, "train", tmp_path), fresh)


def test_a_cache_of_other_data_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vqvae, split = make_vqvae(), make_split(23)
    pixels, labels = split.images.clone(), split.labels.clone()
    pixels[22, 0, 27, 27] ^= 255
    labels[22] += 1
    extract_cached(vqvae, "f", split, "train", tmp_path)
    monkeypatch.setattr(prior.codes, "extract", fail)
    turned = Split(split.images.flip(0), split.labels.flip(0))
    for other in (Split(pixels, split.labels), Split(split.images, labels), turned, split.first(22)):
        with pytest.raises(AssertionError, match="extracted anew"):
            extract_cached(vqvae, "f", other, "train", tmp_path)


@pytest.mark.parametrize(
    "damage", ["empty", "cut short", "random bytes", "one code", "another file", "another shape", "out of range"]
)
def test_a_damaged_cache_is_replaced(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vqvae, split, path = make_vqvae(), make_split(23), tmp_path / "codes-train.safetensors"
    expected = extract(vqvae, split)
    shape, code = {"another shape": ((23, 7, 6), 0), "out of range": ((23, 7, 7), 16)}.get(damage, ((23, 7, 7), 3))
    with monkeypatch.context() as patch:
        patch.setattr(prior.codes, "extract", lambda *_: Codes(torch.full(shape, code), split.labels))
        extract_cached(vqvae, "f", split, "train", tmp_path)
    whole = path.read_bytes()
    if damage == "another file":
        save_file({"x": torch.zeros(3)}, path)
    elif shape == (23, 7, 7) and code == 3:
        noise = bytes(torch.randint(256, (500,), generator=torch.Generator().manual_seed(0)).tolist())
        one_code = whole[:-2] + b"\x04\0"
        path.write_bytes({"empty": b"", "cut short": whole[:-100], "random bytes": noise, "one code": one_code}[damage])
    assert equal(extract_cached(vqvae, "f", split, "train", tmp_path), expected)
    monkeypatch.setattr(prior.codes, "extract", fail)
    assert equal(extract_cached(vqvae, "f", split, "train", tmp_path), expected)
