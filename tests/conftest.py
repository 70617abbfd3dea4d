"""Settings and fixtures of all tests."""

import os
from pathlib import Path

import pytest

# numpy's BLAS would start a thread for each core in each of pytest's workers. On a busy machine these threads wait for
# each other: decompositions of small matrices took 12 times as long. numpy reads the variable at its first import, and
# no plugin imports numpy earlier. Processes that tests start inherit the variable.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

# one thread, as each worker has in training: on a busy machine several threads wait for each other
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns one more than the number of cores, because many tests wait for processes or for time to pass."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests of commands first, because they take longest: at the end no process waits for another one."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
