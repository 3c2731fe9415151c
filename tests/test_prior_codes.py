"""Code maps of a split: what is extracted, and when the cache on disk is believed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import prior.codes
from prior.codes import Codes, extract, extract_cached
from vqvae.common.data import Split
from vqvae.model import VQVAE, VQVAEConfig


def make_vqvae(seed: int = 0, k: int = 512) -> VQVAE:
    torch.manual_seed(seed)
    vqvae = VQVAE(VQVAEConfig(hidden_size=4, k=k, width=8, num_encoder_blocks=1, num_decoder_blocks=1)).eval()
    with torch.no_grad():  # codes where the encoder's vectors are, so that many are chosen
        latents = vqvae.latents(torch.rand(k // 49 + 1, 1, 28, 28) * 2 - 1)
        vqvae.quantizer.codebook.copy_(latents.permute(0, 2, 3, 1).flatten(0, 2)[:k])
    return vqvae


def make_split(num: int = 23, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(10, (num,), generator=generator))


def equal(one: Codes, other: Codes) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def fail(*_: object) -> Codes:
    raise AssertionError("extracted anew")


def test_codes_are_those_of_each_image_alone_under_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior.codes, "EXTRACTION_BATCH", 7)
    vqvae, split = make_vqvae(), make_split()
    codes = extract(vqvae, split)
    assert (codes.indices.shape, codes.indices.dtype) == ((23, 7, 7), torch.int64)
    assert torch.equal(codes.labels, split.labels)
    with torch.no_grad():
        x = (split.images.double() / 255 * 2 - 1).float()
        alone = torch.cat([vqvae.encode(x[n : n + 1]) for n in range(23)])
    assert (alone == codes.indices).double().mean() > 0.99  # all but ties up to rounding
    assert codes.indices.unique().numel() > 100


def test_extraction_changes_nothing_of_a_model_in_training_and_restores_its_mode() -> None:
    config = VQVAEConfig(
        hidden_size=4, k=16, width=8, num_encoder_blocks=1, num_decoder_blocks=1, codebook_learning="ema"
    )
    vqvae = VQVAE(config).train()
    vqvae.decoder.eval()
    before = {name: tensor.clone() for name, tensor in vqvae.state_dict().items()}
    extract(vqvae, make_split())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vqvae.state_dict().items())
    assert vqvae.encoder.training
    assert not vqvae.decoder.training


def test_extracted_codes_can_be_trained_on() -> None:
    codes = extract(make_vqvae(), make_split())
    table = torch.zeros(512, 3, requires_grad=True)
    torch.nn.functional.embedding(codes.indices, table).sum().backward()


def test_the_cache_gives_back_what_was_extracted_without_extracting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqvae, split = make_vqvae(), make_split()
    first = extract_cached(vqvae, "f" * 64, split, "train", tmp_path)
    assert equal(first, extract(vqvae, split))
    assert first.indices.max() > 255  # more than a byte holds
    assert [path.name for path in tmp_path.iterdir()] == ["codes-train.safetensors"]
    monkeypatch.setattr(prior.codes, "extract", fail)
    assert equal(extract_cached(vqvae, "f" * 64, split, "train", tmp_path), first)


def test_the_largest_number_of_codes_survives_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    highest = Codes(torch.full((1, 7, 7), 32766), torch.tensor([9]))
    monkeypatch.setattr(prior.codes, "extract", lambda *_: highest)
    for _ in range(2):
        assert equal(extract_cached(make_vqvae(), "f", make_split(1), "train", tmp_path), highest)


def test_a_cache_of_another_vqvae_is_not_used_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, split = make_vqvae(0), make_vqvae(1), make_split()
    stale = extract_cached(one, "one", split, "train", tmp_path)
    fresh = extract_cached(other, "other", split, "train", tmp_path)
    assert not equal(fresh, stale)
    assert equal(fresh, extract(other, split))
    monkeypatch.setattr(prior.codes, "extract", fail)
    assert equal(extract_cached(other, "other", split, "train", tmp_path), fresh)


@pytest.mark.parametrize("changed", ["one pixel", "one label", "order", "fewer"])
def test_a_cache_of_other_data_is_not_used(tmp_path: Path, changed: str) -> None:
    vqvae, split = make_vqvae(), make_split()
    extract_cached(vqvae, "f", split, "train", tmp_path)
    images, labels = split.images.clone(), split.labels.clone()
    if changed == "one pixel":
        images[22, 0, 27, 27] ^= 255
    elif changed == "one label":
        labels[22] = (labels[22] + 1) % 10
    elif changed == "order":
        images, labels = images.flip(0), labels.flip(0)
    else:
        images, labels = images[:-1], labels[:-1]
    found = extract_cached(vqvae, "f", Split(images, labels), "train", tmp_path)
    assert equal(found, extract(vqvae, Split(images, labels)))


def test_splits_do_not_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vqvae, train, validation = make_vqvae(), make_split(23), make_split(5, seed=1)
    both = [extract_cached(vqvae, "f", train, "train", tmp_path)]
    both.append(extract_cached(vqvae, "f", validation, "validation", tmp_path))
    monkeypatch.setattr(prior.codes, "extract", fail)
    assert equal(extract_cached(vqvae, "f", train, "train", tmp_path), both[0])
    assert equal(extract_cached(vqvae, "f", validation, "validation", tmp_path), both[1])


@pytest.mark.parametrize("damage", ["empty", "cut short", "random bytes", "another safetensors file"])
def test_a_damaged_cache_is_replaced(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vqvae, split, path = make_vqvae(), make_split(), tmp_path / "codes-train.safetensors"
    expected = extract_cached(vqvae, "f", split, "train", tmp_path)
    if damage == "another safetensors file":
        save_file({"x": torch.zeros(3)}, path)
    else:
        whole = path.read_bytes()
        noise = bytes(torch.randint(256, (500,), generator=torch.Generator().manual_seed(0)).tolist())
        path.write_bytes({"empty": b"", "cut short": whole[:-100], "random bytes": noise}[damage])
    assert equal(extract_cached(vqvae, "f", split, "train", tmp_path), expected)
    monkeypatch.setattr(prior.codes, "extract", fail)
    assert equal(extract_cached(vqvae, "f", split, "train", tmp_path), expected)
