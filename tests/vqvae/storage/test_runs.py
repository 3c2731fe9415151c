import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from vqvae.errors import InputError, MissingFileError
from vqvae.storage import checkpoint, runs
from vqvae.storage.runs import describe, find_classifier, find_pair, find_vqvae, folder_for, relative, run_lock

MINE, SHIPPED = Path("checkpoints/mine"), Path("checkpoints/pretrained")
RESUME_FILE, SCRATCH_FILE = MINE / "vqvae/resume.pt", MINE / "vqvae/.resume.pt.x.partial"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a place of its own for the shipped weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / SHIPPED)
    return tmp_path


def write(name: str, stage: str, age_s: int = 0, vqvae: Path | None = None, seed: int = 0) -> Path:
    """Weights in checkpoints/<name>, `age_s` seconds old. A prior belongs to the VQ-VAE."""
    torch.manual_seed(seed)
    path = runs.weights_file(runs.RUNS / name, stage)
    owner = checkpoint.read_header(vqvae, "vqvae").fingerprint if vqvae else None
    facts = {"config": {}, "data": {}, "recipe": {}, "metrics": {}}
    checkpoint.save(path, nn.Linear(2, 2), stage=stage, vqvae_fingerprint=owner, **facts)
    os.utime(path, (1_700_000_000 - age_s,) * 2)
    return path


def take(folder: Path = MINE, stage: str = "vqvae", resume: bool = False, overwrite: bool = False) -> None:
    with run_lock(folder, stage, resume, overwrite):
        assert (folder / stage).is_dir()


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


LOGS = [MINE / "vqvae" / name for name in ("events.out.tfevents.1.somebody", "metrics.jsonl")]


@pytest.mark.parametrize("left", [MINE / "vqvae.safetensors", RESUME_FILE, *LOGS], ids=lambda path: path.name)
def test_a_run_is_only_replaced_or_resumed_on_request_and_no_message_leads_in_a_circle(left: Path) -> None:
    put(left)
    with pytest.raises(InputError, match=rf"no vqvae run in .*/mine, found one \(.*{left.name}\); ") as refusal:
        take()
    assert "replace it with `overwrite=True`" in str(refusal.value)
    assert ("go on with it with `resume=True`" in str(refusal.value)) == (left == RESUME_FILE)
    if left == RESUME_FILE:
        take(resume=True)
    else:
        message = f"a run to resume at {RESUME_FILE}, found none, but {left}; start anew with `overwrite=True`"
        with pytest.raises(MissingFileError, match=message):
            take(resume=True)
    take(stage="prior")  # the other stage may be trained beside it
    assert left.read_bytes() == b"x"
    take(overwrite=True)
    assert left.read_bytes() == b"x"  # the new run's first save replaces it, and nothing is deleted before


def test_where_nothing_is_there_is_nothing_to_resume_and_nothing_is_made() -> None:
    with pytest.raises(MissingFileError, match=f"a run to resume at {RESUME_FILE}, found none; start one without"):
        take(resume=True)
    assert not runs.RUNS.exists()
    take(Path())
    put(Path("vqvae/resume.pt"))
    with pytest.raises(InputError, match=r"no vqvae run in the current folder, found one \(vqvae/resume.pt\); "):
        take(Path())


def test_a_run_that_is_refused_deletes_nothing_and_one_that_starts_what_was_left_half_written(workplace: Path) -> None:
    put(RESUME_FILE, SCRATCH_FILE, MINE / ".vqvae.safetensors.x.partial")
    put(SHIPPED / "vqvae/resume.pt", SHIPPED / ".vqvae.safetensors.x.partial")
    before = sorted((path, path.stat().st_ctime_ns * path.is_file()) for path in workplace.rglob("*"))
    with pytest.raises(InputError, match=r"expected `resume=True` or `overwrite=True`, found both; choose one of them"):
        take(resume=True, overwrite=True)
    with pytest.raises(InputError, match="expected no vqvae run"):
        take()
    for options in ({"resume": True}, {"overwrite": True}, {}):
        for folder in (SHIPPED, Path("checkpoints/x/../pretrained"), workplace / SHIPPED):
            with pytest.raises(InputError, match=r"expected an `output_folder` of your own, found .*pretrained, which"):
                take(folder, **options)
    for folder in (RESUME_FILE / "run", Path("x" * 300)):  # they cannot be made
        with pytest.raises(InputError, match=f"expected to write {folder}/.+; name another `output_folder`"):
            take(folder)
    assert sorted((path, path.stat().st_ctime_ns * path.is_file()) for path in workplace.rglob("*")) == before
    put(other := MINE / ".prior.safetensors.x.partial")  # another process is writing the prior
    take(resume=True)
    left = (RESUME_FILE, other, SCRATCH_FILE, MINE / ".vqvae.safetensors.x.partial")
    assert [path.exists() for path in left] == [True, True, False, False]


def test_a_folder_is_free_again_when_its_run_ends_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with run_lock(MINE, "vqvae", resume=False, overwrite=False):
        put(RESUME_FILE, SCRATCH_FILE)  # the second is being written
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"expected nobody else at work in {MINE}, found a vqvae run that"):
                take(**options)
        take(stage="prior")
        with monkeypatch.context() as patch:
            patch.setattr(runs, "is_main", lambda: False)
            take(overwrite=True)  # of several processes the main one alone holds the lock
        assert RESUME_FILE.exists()
        assert SCRATCH_FILE.exists()
    with pytest.raises(ZeroDivisionError), run_lock(MINE, "vqvae", resume=True, overwrite=False):
        _ = 1 / 0
    take(resume=True)


def test_a_second_training_in_a_thread_of_the_same_process_is_refused() -> None:
    with run_lock(MINE, "vqvae", resume=False, overwrite=False), ThreadPoolExecutor() as threads:
        with pytest.raises(InputError, match=r"expected one training at a time in a process, found a second; start it"):
            threads.submit(take, Path("checkpoints/yours")).result()
    take(Path("checkpoints/yours"))


@pytest.mark.parametrize("name", ["vqvae.safetensors", "vqvae/resume.pt", "vqvae/metrics.jsonl", "vqvae/.lock"])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_what_is_no_file_where_a_run_keeps_one_is_told_in_a_sentence(name: str, options: dict[str, bool]) -> None:
    put(RESUME_FILE)
    (MINE / name).unlink(missing_ok=True)
    (MINE / name).mkdir()
    with pytest.raises(InputError, match=r"expected (to write|no vqvae run) .*mine.*; .*$") as refusal:
        take(**options)
    assert ("Is a directory" in str(refusal.value)) or (name, options) == ("vqvae/.lock", {})


@pytest.mark.skipif(os.name == "nt", reason="Windows has locks of its own")
def test_a_lock_file_that_a_killed_run_left_is_no_lock_where_the_file_system_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(MINE / "vqvae/.lock")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "none here")))
    take()


@pytest.mark.parametrize("name", ["vqvae.safetensors", "vqvae/metrics.jsonl"])
def test_a_file_that_cannot_be_opened_at_a_runs_end_is_refused_at_its_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(RESUME_FILE, MINE / name)
    opened = os.open

    def guarded(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path) == str(MINE / name):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(InputError, match=f"expected to (read|write) {MINE / name}: Permission denied; mend that"):
        take(overwrite=True)


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "x"), OSError(errno.EIO, "bad disk")])
def test_a_file_system_without_locks_costs_a_remark(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs.FileLock, "acquire", Mock(side_effect=error))
    if "bad disk" in str(error):
        with pytest.raises(InputError, match=f"expected to write to {MINE}: bad disk; name another `output_folder`"):
            take()
    else:
        take()
        assert capsys.readouterr().err == f"{MINE} cannot be locked; see that no other process trains there\n"


def test_the_named_file_comes_first_then_the_users_newest_then_the_shipped_one() -> None:
    shipped = Path.cwd() / SHIPPED / "vqvae.safetensors"
    assert find_vqvae(None) == shipped  # if it is not there, its reader says so
    write("pretrained", "vqvae")
    write("a", "prior")
    assert find_vqvae(None) == shipped
    for name, age_s in (("a", 20), ("b", 10), ("c", 30)):
        write(name, "vqvae", age_s)
    assert find_vqvae(None) == runs.RUNS / "b" / "vqvae.safetensors"
    assert find_vqvae(Path("elsewhere/x.safetensors")) == Path("elsewhere/x.safetensors")


def test_of_the_classifiers_that_fit_the_users_newest_is_found_then_the_shipped_one_or_none() -> None:
    def found(*misfits: Path) -> Path | None:
        unwanted = [checkpoint.read_header(path, "classifier").fingerprint for path in misfits]
        return find_classifier(None, lambda header: header.fingerprint not in unwanted)

    assert found() is None
    shipped = write("pretrained", "classifier").resolve()
    old, new = (write(name, "classifier", age_s, seed=age_s) for name, age_s in (("a", 20), ("b", 10)))
    assert [found(), found(new), found(old, new), found(old, new, shipped)] == [new, old, shipped, None]
    assert find_classifier(Path("elsewhere"), lambda header: False) == Path("elsewhere")


def test_a_classifier_beside_the_pair_is_found_before_newer_ones() -> None:
    newer, beside = write("b", "classifier"), write("../mine", "classifier", age_s=10, seed=1)
    assert find_classifier(None, lambda header: True, beside.with_name("vqvae.safetensors")) == beside
    assert find_classifier(None, lambda header: True, Path("elsewhere/vqvae.safetensors")) == newer


def test_a_prior_is_found_with_the_vqvae_that_it_was_trained_on_or_not_at_all() -> None:
    shipped = write("pretrained", "vqvae", seed=1).resolve()
    shipped_prior = write("pretrained", "prior", vqvae=shipped).resolve()
    assert find_pair(None, None) == (shipped, shipped_prior)
    mine = write("mine", "vqvae", age_s=30, seed=2)
    prior = write("mine", "prior", age_s=20, vqvae=mine)
    write("later", "vqvae", age_s=10, seed=3)  # newer, but no prior belongs to it
    orphan = write("replaced", "prior", vqvae=write("replaced", "vqvae", seed=4))  # newest, but without its VQ-VAE
    write("replaced", "vqvae", age_s=50, seed=5)
    assert find_pair(None, None) == find_pair(mine, None) == (mine, prior)
    assert find_pair(shipped, None) == (shipped, shipped_prior)
    of_shipped = write("elsewhere", "prior", age_s=40, vqvae=shipped)
    assert find_pair(None, of_shipped) == (shipped, of_shipped)
    assert find_pair(Path("a"), Path("b")) == (Path("a"), Path("b"))  # two that are named are not looked for
    away = write("../away", "vqvae", seed=6)  # not among the runs
    its_prior = write("../away", "prior", vqvae=away)
    assert find_pair(away, None) == find_pair(None, its_prior) == (away, its_prior)
    message = (
        rf"found no two that belong together among .*; train one with `train_prior\(\)`, given `vqvae='{orphan.parent}/"
    )
    with pytest.raises(InputError, match=message):
        find_pair(None, orphan)


def test_a_foreign_or_damaged_file_among_the_runs_does_not_stand_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    write("pretrained", "prior", vqvae=write("pretrained", "vqvae"))
    mine = write("mine", "vqvae", age_s=10, seed=2)
    prior = write("mine", "prior", age_s=10, vqvae=mine)
    put(runs.RUNS / "foreign/vqvae.safetensors", runs.RUNS / "foreign/prior.safetensors", runs.RUNS / "note.txt")
    (runs.RUNS / "folder/vqvae.safetensors").mkdir(parents=True)
    (runs.RUNS / "folder/prior.safetensors").symlink_to("/dev/null")
    (runs.RUNS / "loop").symlink_to("loop")
    (runs.RUNS / "gone").symlink_to("nowhere")
    write("other", "prior").rename(runs.RUNS / "other/vqvae.safetensors")
    write("cut", "vqvae").write_bytes(mine.read_bytes()[:-1])
    (runs.RUNS / os.fsdecode(b"caf\xe9\n")).mkdir()
    put(runs.RUNS / os.fsdecode(b"caf\xe9\n") / "vqvae.safetensors")
    assert find_vqvae(None) == mine
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 6
    assert all(line.startswith("left out checkpoints/") and "prior.safetensors" not in line for line in told)
    assert f"left out {runs.RUNS}/cut/vqvae.safetensors, which cannot be read as a vqvae checkpoint of this" in str(
        told
    )
    assert find_pair(None, None) == (mine, prior)
    assert len(capsys.readouterr().err.splitlines()) == 9
    with pytest.raises(InputError, match=r"expected a prior checkpoint at .*foreign/prior.safetensors, found a file"):
        find_pair(None, runs.RUNS / "foreign/prior.safetensors")  # a file that is named is needed


def test_each_header_is_read_at_most_once_and_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], checkpoint.read_header
    vqvaes = [write(f"run{n}", "vqvae", age_s=n, seed=n) for n in range(6)]
    write("copy", "vqvae", age_s=50, seed=4)  # of a newer one, which comes first
    write("pretrained", "prior", vqvae=write("pretrained", "vqvae", seed=9))
    for n in range(4):
        write(f"run{n}", "prior", age_s=n)  # whose VQ-VAEs are lost
    fit = [write("old", "prior", age_s=90, vqvae=vqvaes[4]), write("older", "prior", age_s=99, vqvae=vqvaes[0])]
    monkeypatch.setattr(runs, "read_header", lambda path, stage: read.append(path) or real(path, stage))
    assert find_vqvae(None) == vqvaes[0]
    assert read == vqvaes[:1]
    read.clear()
    assert find_pair(vqvaes[0], None) == (vqvaes[0], fit[1])
    assert find_pair(None, fit[1]) == (vqvaes[0], fit[1])
    assert len(read) == 7 + 3  # the third is looked for beside the given prior
    read.clear()
    assert find_pair(None, None) == (vqvaes[4], fit[0])
    assert len(read) == len(set(read)) == 5 + 8  # and not "older"


def test_a_path_is_described_from_here_and_with_its_owner(workplace: Path) -> None:
    assert describe(SHIPPED / "prior.safetensors") == "checkpoints/pretrained/prior.safetensors (the shipped weights)"
    assert describe(Path("x/../checkpoints/pretrained/a")) == "checkpoints/pretrained/a (the shipped weights)"
    assert describe(workplace / MINE / "vqvae.safetensors") == "checkpoints/mine/vqvae.safetensors (your run)"
    outside = workplace.parent / "other" / "vqvae.safetensors"
    assert describe(outside) == f"{outside} (your run)"
    assert relative(outside) == outside
    assert relative(workplace / "a" / "b") == relative(Path("a/b")) == Path("a/b")


def test_shipped_weights_that_an_installer_made_links_are_known_and_never_written_through_a_link() -> None:
    SHIPPED.mkdir(parents=True)
    (SHIPPED / "vqvae.safetensors").symlink_to(write("cache", "vqvae").resolve())
    MINE.mkdir()
    (MINE / "vqvae.safetensors").symlink_to("../pretrained/vqvae.safetensors")
    for folder in (SHIPPED, MINE):
        assert "(the shipped weights)" in describe(folder / "vqvae.safetensors")
        with pytest.raises(InputError, match=r"expected an `output_folder` of your own, found .*shipped weights; name"):
            take(folder, overwrite=True)


def test_a_run_that_names_no_folder_goes_to_that_of_its_vqvae_or_of_its_recipe() -> None:
    recipe = Path("configs/fast.toml")
    assert folder_for(recipe) == folder_for(recipe, SHIPPED / "vqvae.safetensors") == Path("checkpoints/fast")
    assert folder_for(recipe, Path("elsewhere/vqvae.safetensors")) == Path("elsewhere")
    for name in ("configs/..", "..toml", "...toml"):
        with pytest.raises(InputError, match=f"expected a recipe's name to name a folder, found {name}; give `output"):
            folder_for(Path(name))
