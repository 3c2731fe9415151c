"""What a run writes so that people can follow it: TensorBoard's events and `metrics.jsonl`.

Everything is written at once, and by the thread that asks for it. TensorBoard's own writer has a thread and a queue,
whose errors would come later or not at all.
"""

import json
import math
import os
import re
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.tensorboard import summary
from torch.utils.tensorboard._pytorch_graph import graph

from vqvae.distributed import is_main
from vqvae.storage.files import open_regular

EVENTS = "events.out.tfevents."  # how the names of TensorBoard's files begin


class RunLog:
    """The log of a run. Scalars go to both places, pictures and the graph to TensorBoard alone. Of several processes
    the main one writes.

    Args:
        folder: of the run; it is made if it is missing. None: nothing is written.
        first_step: the step to go on from. Everything that was logged at that step or later is dropped. 0 starts anew.
    Raises:
        OSError: something cannot be written. Every method may raise it.
    """

    def __init__(self, folder: Path | None, first_step: int) -> None:
        self.events: BinaryIO | None = None
        if folder is None or not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.jsonl = folder / "metrics.jsonl"
        self.jsonl.touch()
        with open(self.jsonl, "r+b", opener=open_regular) as file:
            kept = [] if first_step == 0 else [line for line in file if _step(line) < first_step]
            file.seek(0)
            file.write(b"".join(kept))
            file.truncate()
        old = [path for path in folder.glob(f"{EVENTS}*") if path.is_symlink() or path.is_file()]
        self.events = (folder / _name_after(old)).open("xb")
        self._add(Event(file_version="brain.Event:2"))
        if first_step > 0:  # TensorBoard hides what the older files have of this step and later
            self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
            return
        for path in old:
            path.unlink()

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.events is None:
            return
        for name, value in values.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))
        # Not opened by "a", which would make it, so that a folder that is gone is told.
        with open(self.jsonl, "r+b", opener=open_regular) as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps({"step": step, **values}).encode() + b"\n")

    def picture(self, tag: str, picture: Tensor, step: int) -> None:
        """A (3, H, W) picture in 0..1. All steps share one tag, so that TensorBoard shows a slider."""
        if self.events is not None:
            self._add(Event(step=step, summary=summary.image(tag, picture, dataformats="CHW")))

    def graph(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        """The network's graph, traced on an example of its inputs."""
        if self.events is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns that it is deprecated, and of our checks of shapes
            definition, _ = graph(model, example)
        self._add(Event(graph_def=definition.SerializeToString()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.events is not None:
            with suppress(OSError):  # all is written; what was not has been told
                self.events.close()

    def _add(self, event: Event) -> None:
        assert self.events is not None
        event.wall_time = time.time()
        RecordWriter(self.events).write(event.SerializeToString())
        self.events.flush()


def _name_after(files: list[Path]) -> str:
    """A name for a file of events. TensorBoard reads such files in the order of the times in their names, so the time
    is later than any of them, even if the clock was set back."""
    found = [re.match(rf"{re.escape(EVENTS)}(\d+)", path.name) for path in files]
    return f"{EVENTS}{max([int(time.time()), *(int(match[1]) + 1 for match in found if match)]):010d}"


def _step(line: bytes) -> float:
    """The step of a line of `metrics.jsonl`. A line that is damaged, or was cut off, has step infinity, so that it is
    dropped."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return math.inf
