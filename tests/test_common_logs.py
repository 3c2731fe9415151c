import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from vqvae.common.logs import RunLog


def write(folder: Path, first_step: int, steps: list[int], offset: float = 0.0) -> None:
    with RunLog(folder, first_step) as log:
        for step in steps:
            log.scalars({"loss/train": step + offset, "lr": 0.5}, step)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalars_go_to_both_places(tmp_path: Path) -> None:
    write(tmp_path / "new" / "run", 0, [1, 2, 3])
    expected = [{"step": step, "loss/train": float(step), "lr": 0.5} for step in (1, 2, 3)]
    assert rows(tmp_path / "new" / "run") == expected
    assert curve(tmp_path / "new" / "run", "loss/train") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert curve(tmp_path / "new" / "run", "lr") == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.scalars({"loss": 1.0}, 1)
        assert rows(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_going_on_drops_what_was_logged_after_the_last_good_step(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3, 4])
    write(tmp_path, 2, [3, 4, 5], offset=0.5)
    expected = [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert [(row["step"], row["loss/train"]) for row in rows(tmp_path)] == expected
    assert curve(tmp_path, "loss/train") == expected


def test_starting_anew_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3, 4])
    (tmp_path / "resume.pt").write_bytes(b"not a log")
    write(tmp_path, 0, [1], offset=0.5)
    assert [(row["step"], row["loss/train"]) for row in rows(tmp_path)] == [(1, 1.5)]
    assert curve(tmp_path, "loss/train") == [(1, 1.5)]
    assert (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("tail", ['{"step": 3, "loss/tr', '{"step"', "{"])
def test_a_last_line_cut_short_by_a_crash_is_dropped(tmp_path: Path, tail: str) -> None:
    write(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write(tmp_path, 2, [3])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_going_on_without_a_log_starts_one(tmp_path: Path) -> None:
    write(tmp_path, 5, [6])
    assert [row["step"] for row in rows(tmp_path)] == [6]


def test_pictures_and_the_graph_are_for_tensorboard(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        for step in (1, 2):
            log.picture("samples", torch.full((3, 4, 6), step / 2), step)
        log.graph(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.zeros(1, 2),))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.width, event.height) for event in events.Images("samples")] == [(1, 6, 4), (2, 6, 4)]
    assert any("Linear" in node.name for node in events.Graph().node)
    assert rows(tmp_path) == []


def test_going_on_drops_lines_that_are_damaged(tmp_path: Path) -> None:
    whole = b'{"step": 1, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 2, "lo\n\xff\xfe\n[1]\n{"loss": 1}\n')
    write(tmp_path, 5, [6])
    assert [row["step"] for row in rows(tmp_path)] == [1, 6]
