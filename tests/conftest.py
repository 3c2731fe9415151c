"""What every test file shares: the fixture's folder, and one thread so that timings and sums are steady."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fixture_folder() -> Path:
    """A data folder with 480 training and 120 test digits of the real MNIST."""
    return Path(__file__).parent / "fixture"
