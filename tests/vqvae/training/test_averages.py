import pytest
import torch

from vqvae.training.averages import MetricAverager

VALUES = torch.randn(23, generator=torch.Generator().manual_seed(0))
FIRST, SECOND, LAST = (part.mean().item() for part in VALUES.split(10))


def test_averages_weigh_samples_and_a_flush_gives_what_was_added_since_the_last_one() -> None:
    averager, other, mean = MetricAverager(), MetricAverager(), VALUES.double().mean().item()
    for part in VALUES.split(10):
        for each in (averager, other):
            each.add({"x": part.mean(), "twice": 2 * part.mean()}, len(part))
    assert other.averages() == pytest.approx({"x": mean, "twice": 2 * mean}, rel=1e-6)
    assert abs((FIRST + SECOND + LAST) / 3 - mean) > 1e-3  # which an average of averages would not have met
    assert averager.flush() == [{"x": x, "twice": 2 * x} for x in (FIRST, SECOND, LAST)]
    assert averager.flush() == []
    averager.add({"x": torch.tensor(7.0, requires_grad=True), "twice": torch.tensor(14.0)}, 1)
    assert not averager.unread.requires_grad  # values are kept without what they were computed from
    assert averager.flush() == [{"x": 7.0, "twice": 14.0}]
    columns = {"x": [FIRST, SECOND, LAST, 7.0], "twice": [2 * FIRST, 2 * SECOND, 2 * LAST, 14.0]}
    for step in range(200):  # more than there are rows for at first
        other.add({"x": torch.tensor(float(step)), "twice": torch.tensor(2.0 * step)}, 1)
    assert other.flush() == [{"x": step, "twice": 2 * step} for step in range(200)]
    assert averager.gather() == {"num": [10, 10, 3, 1], **columns}
