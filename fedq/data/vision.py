"""Datasets of torchvision, downloaded once and split over clients."""

import fcntl
from collections.abc import Callable
from contextlib import redirect_stdout
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from fedq.data.download import CONSOLE, DatasetError, cache_folder
from fedq.data.partition import Partition
from fedq.data.partitioned import MapStyle, Partitioned

# fmt: off
COARSE = np.array([  # CIFAR-100's superclass of each class (Krizhevsky 2009); torchvision does not read the superclass
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
])
# fmt: on


def torchvision_dataset(
    name: str,
    partition: Partition,
    clients: int | None = None,
    path: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    seed: int = 0,
) -> Partitioned:
    """Returns a dataset of torchvision with a partition, for classes that take root, train and download.

    name: a class of torchvision.datasets, such as CIFAR10, CIFAR100, MNIST or FashionMNIST.
    partition: splits the examples over clients.
    clients: number of clients.
    path: folder that holds torchvision's files. None means the cache folder; missing files are downloaded into it.
    mean: mean of each channel, to subtract.
    std: standard deviation of each channel, to divide by.
    seed: seed of the partition, 0 to 2^64 − 1.

    Raises ValueError for another name, and DatasetError if files are missing or damaged.
    """
    source = getattr(torchvision.datasets, name, None)
    if not isinstance(source, type):
        raise ValueError(f"name must be a class of torchvision.datasets, not {name}.")
    root = cache_folder() / "torchvision" if path is None else Path(path).expanduser()
    try:
        train, test = _read(source, root) if path else _obtain(source, root)
    except (OSError, HTTPException, RuntimeError) as error:  # errors of torchvision
        remedy = "set dataset.path= to a folder with" if path is None else "remove dataset.path to download"
        raise DatasetError(
            f"{root} has no usable {name} ({str(error).splitlines()[0]}): try again, or {remedy} torchvision's files."
        ) from error
    if name == "CIFAR100":
        train.coarse_targets = COARSE[train.targets]
    return Partitioned(train, test, partition, clients, mean, std, seed)


def _read(source: Callable[..., Any], root: Path, download: bool = False) -> tuple[Any, MapStyle]:
    return source(root, train=True, download=download), source(root, train=False)


def _obtain(source: Callable[..., Any], root: Path) -> tuple[Any, MapStyle]:
    """Reads both parts; downloads missing files first. Processes that start together download once."""
    try:
        return _read(source, root)
    except RuntimeError:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / "lock", "wb") as lock, redirect_stdout(CONSOLE.file):
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _read(source, root, download=True)
