from pathlib import Path

import pytest

from vqvae.training.history import append_row, read_history, start_history


def test_rows_are_read_as_they_were_written_but_for_what_is_damaged_or_not_yet_whole(tmp_path: Path) -> None:
    path, rows = tmp_path / "metrics.jsonl", [{"step": 50.0, "loss/train_step": 0.1}, {"step": 60.0, "lr": 1e-3}]
    start_history(path, 0)
    assert read_history(path) == []
    for row in rows:
        append_row(path, row)
    assert read_history(path) == rows
    damage = b'\xff\n[1]\n{"loss": 1.0}\n{"step": 61, "loss": "x"}\n{"step": {}}\n\n'
    with path.open("ab") as file:
        file.write(damage + b'{"step": 62, "loss": 2.0}\n{"step": 6')
    assert read_history(path) == [*rows, {"step": 62.0, "loss": 2.0}]


def test_a_file_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        append_row(tmp_path / "metrics.jsonl", {"step": 1})
    assert not any(tmp_path.iterdir())
