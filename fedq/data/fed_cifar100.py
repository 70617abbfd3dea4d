"""CIFAR-100 split over clients, in TensorFlow Federated's files."""

import numpy as np
import torch
from typing_extensions import override

from fedq.data.dataset import Examples
from fedq.data.partitioned import normalised
from fedq.data.tff import TffDataset

SHA256 = "e8575e22c038ecef1ce6c7d492d7abee7da13b1e1ba9b70a7fc18531ba7590de"
LAYOUT = {"image": (np.uint8, (32, 32, 3)), "label": (np.integer, ())}


class FedCifar100(TffDataset):
    """CIFAR-100 (Krizhevsky 2009) in 500 clients, split by Pachinko allocation (Reddi 2021, §C).

    The files are `fed_cifar100_train.h5` and `fed_cifar100_test.h5`. Each client has `image` (uint8, N×32×32×3) and
    `label` (integers from 0 to 99, N). Images become float32, (N, 3, 32, 32), in [0, 1] without mean and std.

    Args:
        path: folder of both files. None means the cache folder; missing files are downloaded into it.
        mean: mean of each channel, to subtract; None for 0.
        std: standard deviation of each channel, to divide by; None for 1.

    Raises DatasetError, here or in a load, if a file is missing or damaged.
    """

    num_classes = 100

    def __init__(
        self, path: str | None = None, mean: list[float] | None = None, std: list[float] | None = None
    ) -> None:
        super().__init__(path, "fed_cifar100", SHA256, LAYOUT)
        self._mean, self._std = mean, std

    @override
    def _examples(self, where: str, *arrays: np.ndarray) -> Examples:
        image, label = arrays
        x = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().float().div(255)
        return Examples(normalised(x, self._mean, self._std), self._labels(where, label))
