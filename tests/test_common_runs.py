import os
from pathlib import Path

import pytest
import torch
from torch import nn

from vqvae.common import checkpoint, runs
from vqvae.common.errors import UserError
from vqvae.common.runs import claimed, describe, find_classifier, find_pair, find_vqvae, weights_file


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a place of its own for the shipped weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "checkpoints" / "pretrained")
    return tmp_path


def write(name: str, stage: str, age_s: int, of: str | None = None, seed: int = 0) -> Path:
    """Weights in checkpoints/<name>, modified `age_s` seconds before a fixed moment."""
    torch.manual_seed(seed)
    path = weights_file(runs.RUNS / name, stage)
    checkpoint.save(path, nn.Linear(2, 2), stage=stage, config={}, recipe={}, metrics={}, vqvae_fingerprint=of)
    os.utime(path, (1_700_000_000 - age_s,) * 2)
    return path


def fingerprint(path: Path) -> str:
    return checkpoint.read_header(path, "vqvae").fingerprint


def test_a_runs_folder_is_made(workplace: Path) -> None:
    with claimed(Path("checkpoints/mine"), "vqvae", resume=False, overwrite=False):
        pass
    assert (workplace / "checkpoints" / "mine" / "vqvae").is_dir()


@pytest.mark.parametrize("left", ["vqvae.safetensors", "vqvae/resume.pt"])
def test_a_run_that_is_there_is_only_replaced_or_resumed_on_request(workplace: Path, left: str) -> None:
    folder = Path("checkpoints/mine")
    (folder / "vqvae").mkdir(parents=True)
    (folder / left).write_bytes(b"weights")
    with pytest.raises(
        UserError, match=r"expected no vqvae run in checkpoints/mine, found one; .*--resume.*--overwrite"
    ):
        with claimed(folder, "vqvae", resume=False, overwrite=False):
            pass
    if left == "vqvae/resume.pt":
        with claimed(folder, "vqvae", resume=True, overwrite=False):
            pass
        assert (folder / left).exists()
    else:
        with pytest.raises(UserError, match=r"expected a run to resume at .*, found none; start one without --resume"):
            with claimed(folder, "vqvae", resume=True, overwrite=False):
                pass
    with claimed(folder, "vqvae", resume=False, overwrite=True):
        pass
    # Weights stay until there are better ones; resume state goes, or --resume could take up the old run.
    assert (folder / left).exists() == (left == "vqvae.safetensors")
    with claimed(folder, "prior", resume=False, overwrite=False):  # the other stage may be trained beside it
        pass


@pytest.mark.parametrize("flag", ["resume", "overwrite", None])
def test_the_shipped_weights_are_never_written_over(workplace: Path, flag: str | None) -> None:
    flags = {"resume": flag == "resume", "overwrite": flag == "overwrite"}
    for folder in (Path("checkpoints/pretrained"), Path("checkpoints/x/../pretrained"), runs.SHIPPED):
        with pytest.raises(UserError, match=r"expected an --output-folder of your own, found .*pretrained"):
            with claimed(folder, "vqvae", **flags):
                pass


def test_an_output_folder_that_cannot_be_made_is_told_in_a_sentence(workplace: Path) -> None:
    Path("file").write_text("no folder")
    with pytest.raises(UserError, match=r"expected to write to file/run: .*; name another --output-folder"):
        with claimed(Path("file/run"), "vqvae", resume=False, overwrite=False):
            pass


def test_a_named_vqvae_goes_before_the_newest_and_the_newest_before_the_shipped(workplace: Path) -> None:
    shipped = write("pretrained", "vqvae", age_s=0)
    assert find_vqvae(None).resolve() == shipped.resolve()
    write("older", "vqvae", age_s=20)
    newer = write("newer", "vqvae", age_s=10)
    assert find_vqvae(None).resolve() == newer.resolve()
    assert find_vqvae(Path("elsewhere/vqvae.safetensors")) == Path("elsewhere/vqvae.safetensors")


def test_a_named_classifier_goes_before_the_newest_and_the_newest_before_the_shipped(workplace: Path) -> None:
    shipped = weights_file(runs.SHIPPED, "classifier")
    assert find_classifier(None) == shipped  # whether it is there, its reader says
    write("pretrained", "classifier", age_s=0)
    write("mine", "vqvae", age_s=0)
    assert find_classifier(None).resolve() == shipped.resolve()
    write("older", "classifier", age_s=20)
    newer = write("newer", "classifier", age_s=10)
    assert find_classifier(None).resolve() == newer.resolve()
    assert find_classifier(Path("elsewhere/classifier.safetensors")) == Path("elsewhere/classifier.safetensors")


def test_the_newest_prior_comes_with_the_vqvae_that_it_was_trained_on(workplace: Path) -> None:
    write("pretrained", "vqvae", age_s=0, seed=1)
    write("pretrained", "prior", age_s=0, of=fingerprint(Path("checkpoints/pretrained/vqvae.safetensors")))
    mine = write("mine", "vqvae", age_s=30, seed=2)
    prior = write("mine", "prior", age_s=20, of=fingerprint(mine))
    write("later", "vqvae", age_s=10, seed=3)  # newer, but no prior belongs to it
    assert find_pair(None, None) == (mine, prior)
    # A prior alone brings its partner along, wherever that lies.
    elsewhere = write("elsewhere", "prior", age_s=40, of=fingerprint(runs.SHIPPED / "vqvae.safetensors"))
    found, _ = find_pair(None, elsewhere)
    assert found.resolve() == (runs.SHIPPED / "vqvae.safetensors").resolve()
    # And a VQ-VAE alone the prior that belongs to it.
    assert find_pair(mine, None) == (mine, prior)


def test_without_runs_of_ones_own_the_shipped_pair_is_found(workplace: Path) -> None:
    vqvae = write("pretrained", "vqvae", age_s=0)
    prior = write("pretrained", "prior", age_s=0, of=fingerprint(vqvae))
    found = find_pair(None, None)
    assert [path.resolve() for path in found] == [vqvae.resolve(), prior.resolve()]


def test_two_that_were_named_are_not_looked_for(workplace: Path) -> None:
    assert find_pair(Path("a"), Path("b")) == (Path("a"), Path("b"))


def test_no_pair_that_fits_is_told_in_a_sentence(workplace: Path) -> None:
    write("pretrained", "vqvae", age_s=0, seed=1)
    write("pretrained", "prior", age_s=0, of="f" * 64)
    mine = write("mine", "vqvae", age_s=30, seed=2)
    message = r"found no two that belong together among .*; train one with: python cli.py train-prior --vqvae "
    with pytest.raises(UserError, match=message + str(mine)):
        find_pair(None, None)


def test_a_path_is_described_from_here_and_by_its_owner(workplace: Path) -> None:
    assert describe(Path("checkpoints/pretrained/vqvae.safetensors")) == (
        "checkpoints/pretrained/vqvae.safetensors (the shipped weights)"
    )
    assert describe(workplace / "checkpoints/mine/vqvae.safetensors") == (
        "checkpoints/mine/vqvae.safetensors (your run)"
    )
    outside = workplace.parent / "other" / "vqvae.safetensors"
    assert describe(outside) == f"{outside.resolve()} (your run)"


def test_what_a_killed_process_left_half_written_is_cleared_away_and_nothing_else(workplace: Path) -> None:
    folder = Path("checkpoints/mine")
    (folder / "vqvae").mkdir(parents=True)
    left = [folder / ".vqvae.safetensors.x1.partial", folder / "vqvae" / ".resume.pt.x2.partial"]
    kept = [folder / ".prior.safetensors.x3.partial", folder / "vqvae" / "metrics.jsonl"]  # the first is being written
    for path in [*left, *kept]:
        path.write_bytes(b"")
    with claimed(folder, "vqvae", resume=False, overwrite=False):
        assert [path.exists() for path in [*left, *kept]] == [False, False, True, True]


def test_a_folder_is_free_again_when_its_run_is_over_and_not_before(workplace: Path) -> None:
    folder = Path("checkpoints/mine")
    with claimed(folder, "vqvae", resume=False, overwrite=False):
        with pytest.raises(UserError, match="expected nobody else at work in checkpoints/mine, found a vqvae run"):
            with claimed(folder, "vqvae", resume=False, overwrite=True):
                pass
        with claimed(folder, "prior", resume=False, overwrite=False):
            pass
    with claimed(folder, "vqvae", resume=False, overwrite=False):
        pass


def test_an_output_folder_whose_name_is_too_long_is_told_in_a_sentence(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"expected to write to .*; name another --output-folder"):
        with claimed(Path("x" * 300), "vqvae", resume=False, overwrite=False):
            pass
