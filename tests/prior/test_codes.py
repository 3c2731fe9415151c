from pathlib import Path

import pytest
import torch

import prior.codes
from prior.codes import Codes, extract, extract_cached
from tests.helpers import make_split, make_vqvae
from vqvae import codec
from vqvae.data.dataset import Split


def equal(one: Codes, other: Codes) -> bool:
    return all(torch.equal(a.long(), b) for a, b in zip(one, other, strict=True))


def fail(*_: object) -> torch.Tensor:
    raise AssertionError("extracted anew")


def test_codes_are_those_of_each_image_alone_under_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "BATCH", 7)
    vqvae, split = make_vqvae(num_codes=512), make_split(23)
    codes = extract(vqvae, split)
    assert (codes.indices.shape, codes.indices.dtype) == ((23, 7, 7), torch.int16)
    assert torch.equal(codes.labels, split.labels)
    with torch.no_grad():
        x = (split.images.double() / 255 * 2 - 1).float()
        alone = torch.cat([vqvae.encode(x[n : n + 1]) for n in range(23)])
    assert (alone == codes.indices).double().mean() > 0.99  # all but ties up to rounding
    assert codes.indices.unique().numel() > 100
    table = torch.zeros(512, 3, requires_grad=True)
    torch.nn.functional.embedding(codes.indices.long(), table).sum().backward()  # they can be trained on


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
    vqvae, splits = make_vqvae(num_codes=32767), {"train": make_split(23), "validation": make_split(5, seed=1)}
    codes = {name: extract(vqvae, split) for name, split in splits.items()}
    codes["train"].indices[0, 0, 0] = 32766  # the largest code that there can be
    monkeypatch.setattr(prior.codes, "AT_ONCE", 10)
    for name, split in splits.items():
        pieces = iter(codes[name].indices.split(10))
        monkeypatch.setattr(prior.codes, "encode_images", lambda *_, pieces=pieces: next(pieces))
        assert equal(extract_cached(vqvae, "f" * 64, split, name, tmp_path), codes[name])
    assert {path.name for path in tmp_path.iterdir()} == {"codes-train.safetensors", "codes-validation.safetensors"}
    monkeypatch.setattr(prior.codes, "encode_images", fail)
    for name, split in splits.items():
        assert equal(extract_cached(vqvae, "f" * 64, split, name, tmp_path), codes[name])


def test_a_cache_of_another_vqvae_or_of_other_data_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, split = make_vqvae(), make_vqvae(seed=1), make_split(23)
    stale = extract_cached(one, "one", split, "train", tmp_path)
    fresh = extract_cached(other, "other", split, "train", tmp_path)
    expected = extract(other, split)
    assert equal(fresh, expected)
    assert not equal(stale, expected)
    monkeypatch.setattr(prior.codes, "encode_images", fail)
    assert equal(extract_cached(other, "other", split, "train", tmp_path), expected)  # the stale one was replaced
    pixels, labels = split.images.clone(), split.labels.clone()
    pixels[22, 0, 27, 27] ^= 255
    labels[22] += 1
    turned = Split(split.images.flip(0), split.labels.flip(0))
    for wrong in (Split(pixels, split.labels), Split(split.images, labels), turned, split.first(22)):
        with pytest.raises(AssertionError, match="extracted anew"):
            extract_cached(other, "other", wrong, "train", tmp_path)


def test_a_cache_that_cannot_be_written_costs_a_remark_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqvae, split, told = make_vqvae(), make_split(5), "the train code maps are not kept for the next run: expected to"
    (tmp_path / "codes-train.safetensors").mkdir()
    assert equal(extract_cached(vqvae, "f" * 64, split, "train", tmp_path), extract(vqvae, split))
    assert capsys.readouterr().err.count(told) == 1
