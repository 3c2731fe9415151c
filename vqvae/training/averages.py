"""Averages of losses and figures over samples, batches and processes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vqvae.distributed import all_gather


class MetricAverager:
    """Averages of named scalars over samples. Values stay on their device until somebody asks for them.

    The sums are exact (math.fsum), so they do not depend on how whole batches were dealt to the processes.

    Args:
        state: what an earlier averager's `gather` gave, to go on from.
    """

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self.state = {name: list(values) for name, values in (state or {}).items()}  # "num" holds the sample counts
        self.unread: list[dict[str, Tensor]] = []

    def add(self, values: Mapping[str, Tensor], num: int) -> None:
        """Add values that are means over `num` samples."""
        # Copies: the mean that mse_loss gives still holds the memory of all that it is the mean of.
        self.unread.append({name: value.detach().clone() for name, value in values.items()})
        self.state.setdefault("num", []).append(num)

    def flush(self) -> list[dict[str, float]]:
        """Read the values that were added since the last flush, and return them. Reading waits for the device."""
        if not self.unread:
            return []
        columns = {name: torch.stack([row[name] for row in self.unread]).tolist() for name in self.unread[0]}
        for name, column in columns.items():
            self.state.setdefault(name, []).extend(column)
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(self.unread))]
        self.unread.clear()
        return rows

    def gather(self) -> dict[str, list[float]]:
        """The state of all processes together. Each of them must ask."""
        self.flush()
        states = all_gather(self.state)
        return {name: [value for state in states for value in state.get(name, [])] for name in states[0]}

    def averages(self) -> dict[str, float]:
        """The averages over all processes' samples. Each of them must ask."""
        values = self.gather()
        nums = values.pop("num")
        return {
            name: math.fsum(value * num for value, num in zip(column, nums, strict=True)) / sum(nums)
            for name, column in values.items()
        }
