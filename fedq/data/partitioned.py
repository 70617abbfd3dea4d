"""A federated dataset of two map-style datasets, such as torchvision's, and a partition."""

import math
from collections.abc import Iterable, Sequence, Sized
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedq.data.dataset import Client, Examples
from fedq.data.download import DatasetError
from fedq.data.partition import Partition
from fedq.keys import Key

ATTRIBUTES = {"label": ("targets", "labels"), "coarse_label": ("coarse_targets",), "client": ("clients",)}
"""Columns of a partition → the attributes of a map-style dataset that may hold them."""


class MapStyle(Sized, Protocol):
    """A dataset as torch.utils.data.Dataset: item i is an input and a label, the same at each call.

    An input is a tensor, a PIL image or an array (H, W) or (H, W, C). uint8 becomes float32 in [0, 1], channels first.
    """

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Returns example `index`."""
        ...


class Partitioned:
    """Splits the examples of a dataset over clients. Each load reads only the client's examples.

    train = torchvision.datasets.CIFAR10("data"); test = torchvision.datasets.CIFAR10("data", train=False)
    dataset = Partitioned(train, test, Dirichlet(alpha=0.1), clients=100)

    train: the examples to split. Partitions read labels from the attribute `targets` or `labels`, superclasses from
        `coarse_targets`, and natural clients from `clients`.
    test: the test examples.
    partition: splits the examples over clients.
    clients: number of clients; None for the natural partition.
    mean: mean of each channel, to subtract; None for 0.
    std: standard deviation of each channel, to divide by; None for 1.
    seed: seed of the partition, 0 to 2^64 − 1.

    Raises ValueError if an argument does not fit the dataset, and DatasetError in a load if examples differ in shape.
    """

    def __init__(
        self,
        train: MapStyle,
        test: MapStyle,
        partition: Partition,
        clients: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
    ) -> None:
        if not hasattr(partition, "split"):
            raise ValueError(f"partition must be an object such as Iid(), not {partition!r}: see dataset/partition=.")
        columns = columns_of(train)
        self._parts = partition.split(len(train), columns, clients, Key(seed).fold("partition"))
        self._train, self._test, self._mean, self._std = train, test, mean, std
        self.num_clients = len(self._parts)
        classes = getattr(train, "classes", None)
        if classes is None and "label" not in columns:
            raise ValueError("the dataset has neither classes nor targets, so that the number of classes is unknown.")
        self.num_classes = len(classes) if classes is not None else 1 + int(columns["label"].max())

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        part = self._parts[number]
        return Client(number, partial(self._read, self._train, part.tolist()), len(part))

    def test(self) -> Examples:
        """Returns the test examples; each call reads them."""
        return self._read(self._test, range(len(self._test)))

    def _read(self, dataset: MapStyle, numbers: Iterable[int]) -> Examples:
        inputs, labels = zip(*(dataset[i] for i in numbers), strict=True)
        return Examples(normalised(stacked(inputs), self._mean, self._std), torch.as_tensor(labels))


def columns_of(dataset: MapStyle) -> dict[str, np.ndarray]:
    """Returns the values of each example in a map-style dataset. Raises ValueError unless labels are integers, (N,)."""
    columns = {}
    for name, attributes in ATTRIBUTES.items():
        found = next((values for a in attributes if (values := getattr(dataset, a, None)) is not None), None)
        if found is None:
            continue
        columns[name] = np.asarray(found)
        dtype, shape = columns[name].dtype, columns[name].shape
        if shape != (len(dataset),) or (name != "client" and dtype.kind not in "iu"):
            raise ValueError(
                f"the dataset's {name}s must be integers, one for each of {len(dataset)} examples, not {dtype} {shape}."
            )
    return columns


def stacked(inputs: Sequence[Any]) -> Tensor:
    """Returns tensors, arrays or PIL images as one tensor (N, …): uint8 as float32 in [0, 1], channels first.

    Raises DatasetError if the shapes differ.
    """
    tensors = [x if isinstance(x, Tensor) else _channels_first(np.array(x)) for x in inputs]
    if len(shapes := {tuple(x.shape) for x in tensors}) > 1:
        examples = " and ".join(map(str, sorted(shapes)[:2]))
        raise DatasetError(
            f"inputs have shapes such as {examples}; all must have one shape: resize images to one size."
        )
    x = torch.stack(tensors)
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def _channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.reshape(*image.shape[:2], -1)).permute(2, 0, 1)


def normalised(x: Tensor, mean: list[float] | None, std: list[float] | None) -> Tensor:
    """Returns (x − mean) / std of each channel, of images (N, C, H, W); x if both are None.

    Raises DatasetError unless mean and std have one number a channel.
    """
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, x.shape[1]):
            raise DatasetError(f"{name} must have {x.shape[1]} numbers, one a channel, not {len(values)}.")
        if values is not None and not all(math.isfinite(v) and (v > 0 or name == "mean") for v in values):
            raise DatasetError(f"{name} must be finite numbers{' above 0' if name == 'std' else ''}, not {values}.")
    if mean is not None:
        x = x - x.new_tensor(mean).reshape(-1, 1, 1)
    return x if std is None else x / x.new_tensor(std).reshape(-1, 1, 1)
