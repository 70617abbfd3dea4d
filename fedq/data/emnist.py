"""Federated EMNIST: handwritten characters, one client a writer."""

import numpy as np
import torch
from typing_extensions import override

from fedq.data.dataset import Examples
from fedq.data.download import DatasetError
from fedq.data.tff import TffDataset

ARCHIVES = {  # only_digits → (name, SHA-256 of its .tar.bz2, number of classes)
    True: ("fed_emnist_digitsonly", "55333deb8546765427c385710ca5e7301e16f4ed8b60c1dc5ae224b42bd5b14b", 10),
    False: ("fed_emnist", "fe1ed5a502cea3a952eb105920bff8cffb32836b5173cb18a57a32c3606f3ea0", 62),
}
LAYOUT = {"pixels": (np.float32, (28, 28)), "label": (np.int32, ())}


class Emnist(TffDataset):
    """EMNIST by writer, in the files of TensorFlow Federated (Caldas et al., "LEAF", 2018).

    The 62 classes are digits, upper case letters and lower case letters. A train file is
    `fed_emnist_digitsonly_train.h5`, or `fed_emnist_train.h5` for 62 classes. Each client has `pixels` (float32,
    N×28×28, in [0, 1]) and `label` (int32, N).

    Args:
        path: folder of both files. None means the cache folder; missing files are downloaded into it.
        only_digits: 10 classes instead of 62.
        background: pixel value of the page: 1.0 as in the files, or 0.0 as in MNIST (1 − pixel).

    Raises ValueError for another background. Raises DatasetError, here or in a load, if a file is missing or damaged.
    """

    def __init__(self, path: str | None = None, only_digits: bool = True, background: float = 1.0) -> None:
        if background not in (0.0, 1.0):
            raise ValueError(f"background must be 0.0 or 1.0, not {background}.")
        name, sha256, self.num_classes = ARCHIVES[only_digits]
        super().__init__(path, name, sha256, LAYOUT)
        self._background = background

    @override
    def _examples(self, where: str, *arrays: np.ndarray) -> Examples:
        pixels, label = arrays
        if not ((pixels >= 0) & (pixels <= 1)).all():  # true also for NaN
            raise DatasetError(f"{where} has pixels outside [0, 1].")
        x = torch.from_numpy(pixels).unsqueeze(1)
        return Examples(x if self._background else 1 - x, self._labels(where, label))
