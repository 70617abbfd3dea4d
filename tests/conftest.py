"""What all tests share."""

import os
from pathlib import Path

import pytest

# numpy's own BLAS has a thread for each core in each of pytest's workers, and on a busy machine they wait for each
# other: decompositions of small matrices took 12 times as long. Read when numpy is first imported, which no plugin
# does before; what tests start inherits it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

# as in training, where each worker has one: on a busy machine more wait for each other
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: many tests wait, for processes or for time to pass."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole commands come first, as they take longest: at the end no process waits for another's last one."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
