import tomllib
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from tests.helpers import log_rows
from vqvae import distributed
from vqvae.shell import PACKAGE, version
from vqvae.training.logs import RunLog

SETTINGS = {"lr": 0.5, "optimizer": "muon", "num_epochs": 3, "mixed_precision": False, "start_from": None}


def write(folder: Path, first_step: int, steps: list[int], offset: float = 0.0) -> None:
    with RunLog(folder, first_step, SETTINGS) as log:
        for step in steps:
            log.scalars({"loss/train": step + offset, "loss/validation": step - offset, "lr": 0.5}, step)


def logged(folder: Path) -> list[tuple[int, float]]:
    """The curve of the loss, which is the same in both places. In TensorBoard both its curves have one name."""
    rows = log_rows(folder)
    for part, tag, name in (("", "loss", "loss/train"), ("", "lr", "lr"), ("validation", "loss", "loss/validation")):
        events = EventAccumulator(str(folder / part)).Reload()
        curve = [(event.step, event.value) for event in events.Scalars(tag)]
        assert curve == [(row["step"], row[name]) for row in rows]
    return [(row["step"], row["loss/train"]) for row in rows]


def test_scalars_go_to_both_places_and_going_on_drops_those_of_its_first_step_and_later(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    write(folder, 3, [4])  # there is no log to go on with
    assert logged(folder) == [(4, 4.0)]
    (folder / "resume.pt").write_bytes(b"not a log")
    write(folder, 0, [1, 2, 3, 4])
    assert logged(folder) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    write(folder, 3, [3, 4, 5], offset=0.5)
    assert logged(folder) == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    write(folder, 0, [1], offset=0.5)
    assert logged(folder) == [(1, 1.5)]
    assert (folder / "resume.pt").read_bytes() == b"not a log"


def test_events_are_read_in_the_order_of_writing_even_if_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "events.out.tfevents.of.somebody").mkdir()
    for i, now in enumerate((2e9, 2e9, 1e9, 3e9, 5.0)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write(tmp_path, 2 * i, [2 * i, 2 * i + 1])
        write(tmp_path, 2 * i + 1, [2 * i + 1])
    (tmp_path / "events.out.tfevents.of.somebody").rmdir()  # what is no file is left alone
    assert logged(tmp_path) == [(step, float(step)) for step in range(10)]
    assert (len([*tmp_path.glob("events*")]), len([*tmp_path.glob("validation/*")])) == (10, 10)
    write(tmp_path, 0, [1])
    assert (len([*tmp_path.glob("events*")]), len([*tmp_path.glob("validation/*")])) == (1, 1)


@pytest.mark.parametrize(
    "damage", [b'{"step": 3, "lo', b'{"step": 2}', b'{"step": 2, "l\n\xff\xfe\n[1]\n{"l": 1}\n', b"9" * 2**22 + b"\n"]
)
def test_going_on_drops_lines_that_are_cut_short_or_damaged(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' + damage)
    RunLog(tmp_path, 5, {}).__exit__()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 1.0}\n'


def test_a_runs_settings_are_there_from_its_start_and_only_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, SETTINGS)  # which is never closed, as of a run that is killed
    write(tmp_path, 3, [3])
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("recipe/text_summary")
    recipe = text.tensor_proto.string_val[0].decode().removeprefix("```toml\n").removesuffix("\n```")
    given = {name: value for name, value in SETTINGS.items() if value is not None}
    assert tomllib.loads(recipe) == given
    assert recipe.startswith(f"# {PACKAGE} {version()}\n")
    ((_, content),) = events.PluginTagToContent("hparams").items()
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()} == given
    log.__exit__()


def test_all_is_on_disk_at_once_and_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with RunLog(tmp_path / str(rank), 0, SETTINGS) as log:
            for step in (1, 2):
                log.picture("samples", torch.full((3, 4, 6), step, dtype=torch.uint8), step)
            log.graph(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.zeros(1, 2),))
            log.scalars({}, 3)
            assert (tmp_path / "0" / "metrics.jsonl").read_text() == '{"step": 3}\n'
            events = EventAccumulator(str(tmp_path / "0")).Reload()  # the log is not yet closed
    assert [(event.step, event.width, event.height) for event in events.Images("samples")] == [(1, 6, 4), (2, 6, 4)]
    assert any("Linear" in node.name for node in events.Graph().node)
    assert not (tmp_path / "1").exists()
