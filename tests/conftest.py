"""What every test shares: one thread, so that sums are the same everywhere, and a `python` that is this one."""

import os
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too; nothing chooses another number
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def this_python() -> None:
    """As in an activated environment. Elsewhere the program names its interpreter by its path."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
