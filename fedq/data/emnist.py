"""Federated EMNIST: handwritten characters, one client a writer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from fedq.data.dataset import Client, Examples
from fedq.data.download import DatasetError, obtain

URL = "https://storage.googleapis.com/tff-datasets-public/"
ARCHIVES = {  # only_digits → (name, SHA-256 of its .tar.bz2, number of classes)
    True: ("fed_emnist_digitsonly", "55333deb8546765427c385710ca5e7301e16f4ed8b60c1dc5ae224b42bd5b14b", 10),
    False: ("fed_emnist", "fe1ed5a502cea3a952eb105920bff8cffb32836b5173cb18a57a32c3606f3ea0", 62),
}
LAYOUT = {"pixels": (np.dtype(np.float32), (28, 28)), "label": (np.dtype(np.int32), ())}


class Emnist:
    """EMNIST by writer, in the files of TensorFlow Federated (Caldas et al., "LEAF", 2018).

    Clients are numbered in the sorted order of their ids (`client_ids`). Each load reads the client from the file, in
    any thread. `test()` reads all clients of the test file, in the sorted order of their ids. The 62 classes are
    digits, upper case and lower case. A train file is `fed_emnist_digitsonly_train.h5`, or `fed_emnist_train.h5` for
    62 classes; the test file has `test` in place of `train`. Each holds `examples/<client id>/pixels` (float32,
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
        train, test = names = (f"{name}_train.h5", f"{name}_test.h5")
        folder = obtain(f"{URL}{name}.tar.bz2", sha256, names) if path is None else Path(path).expanduser()
        self._train, self.client_ids = _open(folder / train)
        self._test, self._test_ids = _open(folder / test)
        self._background = background
        self.num_clients = len(self.client_ids)

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        client_id = self.client_ids[number]
        with _reading(f"{self._train.file.filename}: client {client_id!r}"):
            label = self._train.get(f"{client_id}/label")
        examples = label.shape[0] if isinstance(label, h5py.Dataset) and label.shape else 0
        return Client(number, partial(self._read, self._train, client_id), examples)

    def test(self) -> Examples:
        """Returns the test examples of all clients; each call reads the file."""
        parts = [self._read(self._test, client_id) for client_id in self._test_ids]
        return Examples(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _read(self, clients: h5py.Group, client_id: str) -> Examples:
        where = f"{clients.file.filename}: client {client_id!r}"
        with _reading(where):
            pixels, label = (array[()] for array in _arrays(clients, client_id))
        if not ((pixels >= 0) & (pixels <= 1)).all():  # true also for NaN
            raise DatasetError(f"{where} has pixels outside [0, 1].")
        if not ((label >= 0) & (label < self.num_classes)).all():
            raise DatasetError(f"{where} has labels outside 0 to {self.num_classes - 1}.")
        x = torch.from_numpy(pixels).unsqueeze(1)
        return Examples(x if self._background else 1 - x, torch.from_numpy(label).long())


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:  # h5py: damaged files
        raise DatasetError(f"{where} cannot be read ({error}).") from error


def _open(path: Path) -> tuple[h5py.Group, list[str]]:
    """Returns the group of clients, which keeps the file open, and their sorted ids."""
    if not path.is_file():
        raise DatasetError(f"{path} is missing.")
    with _reading(str(path)):
        clients = h5py.File(path, "r").get("examples")
        if isinstance(clients, h5py.Group) and len(clients):
            return clients, sorted(clients)
    raise DatasetError(f"{path} has no group 'examples' with clients in it.")


def _arrays(clients: h5py.Group, client_id: str) -> list[h5py.Dataset]:
    """Returns a client's pixels and label, unread, after a check of dtypes and shapes."""
    where = f"{clients.file.filename}: client {client_id!r}"
    with _reading(where):
        arrays = [clients.get(f"{client_id}/{name}") for name in LAYOUT]
        for array, (name, (dtype, shape)) in zip(arrays, LAYOUT.items(), strict=True):
            if not isinstance(array, h5py.Dataset):
                raise DatasetError(f"{where} has no array '{name}'.")
            if array.dtype != dtype or not array.shape or array.shape[1:] != shape:
                found = f"{array.dtype} {array.shape}"
                raise DatasetError(f"{where} has '{name}' as {found}, not {dtype} {('N', *shape)}.")
        if len(arrays[0]) != len(arrays[1]):
            raise DatasetError(f"{where} has {len(arrays[0])} images but {len(arrays[1])} labels.")
    return arrays
