"""Averages of losses and figures over samples, batches and processes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vqvae.distributed import all_gather

ROWS = 64  # that are kept unread, at first


class MetricAverager:
    """Averages of named scalars over samples. Values stay on their device until somebody asks for them.

    The sums are exact (math.fsum), so they do not depend on how whole batches were dealt to the processes.

    Args:
        state: what an earlier averager's `gather` gave, to go on from.
    """

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self.state = {name: list(values) for name, values in (state or {}).items()}  # "num" holds the sample counts
        self.names: list[str] = []
        self.unread = torch.empty(0, 0)  # a row for each call of `add`; the first `num_unread` are used
        self.num_unread = 0

    def add(self, values: Mapping[str, Tensor], num: int) -> None:
        """Add values that are means over `num` samples."""
        # In one tensor: small ones of every step would keep the memory between them from being used again. And the mean
        # that mse_loss gives holds the memory of all its elements.
        self.names, row = list(values), torch.stack([value.detach() for value in values.values()])
        if len(self.unread) == 0:
            self.unread = row.new_empty(ROWS, len(row))
        elif self.num_unread == len(self.unread):
            self.unread = torch.cat([self.unread, torch.empty_like(self.unread)])
        self.unread[self.num_unread] = row
        self.num_unread += 1
        self.state.setdefault("num", []).append(num)

    def flush(self) -> list[dict[str, float]]:
        """Read the values that were added since the last flush, and return them. Reading waits for the device."""
        columns = dict(zip(self.names, self.unread[: self.num_unread].T.tolist(), strict=True))
        for name, column in columns.items():
            self.state.setdefault(name, []).extend(column)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.num_unread = 0
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
