"""What a run writes so that people can follow it: TensorBoard's events and `metrics.jsonl`."""

import json
import math
import warnings
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from vqvae.distributed import is_main
from vqvae.storage.files import write_atomically


class RunLog:
    """The log of a run. Scalars go to both places, pictures and the graph to TensorBoard alone. Of several processes
    the main one writes.

    Args:
        folder: of the run; it is made if it is missing.
        first_step: the step to go on from. Everything that was logged at that step or later is dropped. 0 starts anew.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer: SummaryWriter | None = None
        if not is_main():
            return
        self.jsonl = folder / "metrics.jsonl"
        kept = ""
        if first_step > 0 and self.jsonl.exists():
            lines = self.jsonl.read_text(errors="replace").splitlines(keepends=True)
            whole = (line for line in lines if line.endswith("\n"))  # the last line may have been cut off
            kept = "".join(line for line in whole if _step(line) < first_step)
        write_atomically(self.jsonl, kept.encode())
        if first_step == 0:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=first_step if first_step > 0 else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        with self.jsonl.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def picture(self, tag: str, picture: Tensor, step: int) -> None:
        """A (3, H, W) picture in 0..1. All steps share one tag, so that TensorBoard shows a slider."""
        if self.writer is not None:
            self.writer.add_image(tag, picture, step)

    def graph(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        """The network's graph, traced on an example of its inputs."""
        if self.writer is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns that it is deprecated, and of our checks of shapes
            self.writer.add_graph(model, example)

    def flush(self) -> None:
        """Put on disk what was logged so far, so that it survives a kill."""
        if self.writer is not None:
            self.writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()


def _step(line: str) -> float:
    """The step of a line of `metrics.jsonl`. A damaged line has step infinity, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return math.inf
