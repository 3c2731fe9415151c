"""What a run writes so that people can follow it: TensorBoard's events and `metrics.jsonl`.

Everything is written at once, and by the thread that asks for it. TensorBoard's own writer has a thread and a queue,
whose errors would come later or not at all.
"""

import json
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.tensorboard import summary
from torch.utils.tensorboard._pytorch_graph import graph

from vqvae.distributed import is_main
from vqvae.shell import PACKAGE, version
from vqvae.training.history import METRICS_FILE, append_row, start_history

EVENTS = "events.out.tfevents."  # how the names of TensorBoard's files begin
VALIDATION = "validation"


class RunLog:
    """The log of a run. Scalars go to both places, pictures and the graph to TensorBoard alone. Of several processes
    the main one writes.

    In TensorBoard a figure has one chart, in which the run's own curve is the training's, and that of its subfolder
    `validation` the validation's.

    Args:
        folder: of the run; it is made if it is missing. None: nothing is written.
        first_step: the step to go on from. Everything that was logged at that step or later is dropped. 0 starts anew.
        settings: of the run, for people and for comparison with other runs.
    Raises:
        OSError: something cannot be written. Every method may raise it.
    """

    def __init__(self, folder: Path | None, first_step: int, settings: Mapping[str, Any]) -> None:
        self.events: dict[str, BinaryIO] = {}  # by the folder within that of the run
        if folder is None or not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.jsonl = folder / METRICS_FILE
        start_history(self.jsonl, first_step)
        for part in ("", VALIDATION):
            self.events[part] = _open_events(folder / part, first_step)
            self._add(Event(file_version="brain.Event:2"), part)
            if first_step > 0:  # TensorBoard hides what the older files have of this step and later
                self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)), part)
        if first_step == 0:
            given = {name: value for name, value in settings.items() if value is not None}
            self._add(Event(summary=summary.text("recipe", as_markdown(given))))
            # Only these. A list of figures would be taken for that of all runs; without one TensorBoard finds them all.
            _, start, _ = summary.hparams(given, {})
            self._add(Event(summary=start))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log named scalars. The name ends in /train or in /validation where there are both."""
        if not self.events:
            return
        for name, value in values.items():
            figure, _, split = name.partition("/")
            part, tag = (VALIDATION, figure) if split == VALIDATION else ("", name.removesuffix("/train"))
            self._add(Event(step=step, summary=summary.scalar(tag, value)), part)
        append_row(self.jsonl, {"step": step, **values})

    def picture(self, tag: str, picture: Tensor, step: int) -> None:
        """A picture (3, H, W) uint8. All steps share one tag, so that TensorBoard shows a slider."""
        if self.events:
            self._add(Event(step=step, summary=summary.image(tag, picture, dataformats="CHW")))

    def graph(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        """The network's graph, traced on an example of its inputs."""
        if not self.events:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns that it is deprecated, and of our checks of shapes
            definition, _ = graph(model, example)
        self._add(Event(graph_def=definition.SerializeToString()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.events.values():
            with suppress(OSError):  # all is written; what was not has been told
                file.close()

    def _add(self, event: Event, part: str = "") -> None:
        event.wall_time = time.time()
        RecordWriter(self.events[part]).write(event.SerializeToString())
        self.events[part].flush()


def as_markdown(settings: Mapping[str, Any]) -> str:
    """Settings as a recipe has them, and the version of the code, in a block of code."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(["```toml", f"# {PACKAGE} {version()}", *lines, "```"])


def _open_events(folder: Path, first_step: int) -> BinaryIO:
    """A new file for TensorBoard's events, beside the older ones or, if the run starts anew, instead of them."""
    folder.mkdir(exist_ok=True)
    old = [path for path in folder.glob(f"{EVENTS}*") if path.is_symlink() or path.is_file()]
    file = (folder / _name_after(old)).open("xb")
    for path in old if first_step == 0 else ():
        path.unlink()
    return file


def _name_after(files: list[Path]) -> str:
    """A name for a file of events. TensorBoard reads such files in the order of the times in their names, so the time
    is later than any of them, even if the clock was set back."""
    found = [re.match(rf"{re.escape(EVENTS)}(\d+)", path.name) for path in files]
    return f"{EVENTS}{max([int(time.time()), *(int(match[1]) + 1 for match in found if match)]):010d}"
