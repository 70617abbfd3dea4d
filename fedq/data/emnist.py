"""Federated EMNIST: handwritten characters, one client for each writer."""

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
ARCHIVES = {  # only_digits: (name, SHA-256 of its .tar.bz2, number of classes)
    True: ("fed_emnist_digitsonly", "55333deb8546765427c385710ca5e7301e16f4ed8b60c1dc5ae224b42bd5b14b", 10),
    False: ("fed_emnist", "fe1ed5a502cea3a952eb105920bff8cffb32836b5173cb18a57a32c3606f3ea0", 62),
}
LAYOUT = {"pixels": (np.dtype(np.float32), (28, 28)), "label": (np.dtype(np.int32), ())}


class Emnist:
    """EMNIST by writer, as TensorFlow Federated distributes it (Caldas et al., "LEAF", 2018).

    Clients are numbered in the sorted order of their ids (`client_ids`), and read from the file each time
    they are loaded, from any thread. `test()` reads the examples of all clients in the test file, in the
    sorted order of their ids. With 62 classes: digits, upper case, lower case.

    path: a folder with `fed_emnist_digitsonly_train.h5` and `…_test.h5`, or `fed_emnist_train.h5` and
    `…_test.h5` for 62 classes. Each holds `examples/<client id>/pixels` (float32, N×28×28, in [0, 1]) and
    `label` (int32, N). None: the files in the cache folder, downloaded to it if they are not there.
    background: 1.0 as in the files, 0.0 for MNIST's polarity (1 − pixel); anything else is a ValueError.
    Raises DatasetError, here or when examples are read, if the files cannot be had or are damaged.
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
        """Returns client `number`; raises IndexError if there is none."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        client_id = self.client_ids[number]
        label = self._train.get(f"{client_id}/label")  # whether all is in order is seen when it is read
        examples = label.shape[0] if isinstance(label, h5py.Dataset) and label.shape else 0
        return Client(number, partial(self._read, self._train, client_id), examples)

    def test(self) -> Examples:
        """Returns the test examples of all clients, read afresh."""
        sizes = [len(_arrays(self._test, client_id)[1]) for client_id in self._test_ids]
        ends = np.cumsum(sizes).tolist()
        # Room for all at once: parts and then their concatenation would take twice the memory.
        whole = Examples(torch.empty(ends[-1], 1, 28, 28), torch.empty(ends[-1], dtype=torch.int64))
        for client_id, size, end in zip(self._test_ids, sizes, ends, strict=True):
            whole.x[end - size : end], whole.y[end - size : end] = self._read(self._test, client_id)
        return whole

    def _read(self, clients: h5py.Group, client_id: str) -> Examples:
        where = f"{clients.file.filename}: client {client_id!r}"
        with _reading(where):
            pixels, label = (array[()] for array in _arrays(clients, client_id))
        if not ((pixels >= 0) & (pixels <= 1)).all():  # also if one is NaN
            raise DatasetError(f"{where} has pixels outside [0, 1].")
        if not ((label >= 0) & (label < self.num_classes)).all():
            raise DatasetError(f"{where} has labels outside 0 to {self.num_classes - 1}.")
        x = torch.from_numpy(pixels).unsqueeze(1)
        return Examples(x if self._background else 1 - x, torch.from_numpy(label).long())


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py's, on a damaged file
        raise DatasetError(f"{where} cannot be read ({error}).") from error


def _open(path: Path) -> tuple[h5py.Group, list[str]]:
    """Returns a file's group of clients, which keeps the file open, and their sorted ids."""
    if not path.is_file():
        raise DatasetError(f"{path} is missing.")
    with _reading(str(path)):
        clients = h5py.File(path, "r").get("examples")
        if isinstance(clients, h5py.Group) and len(clients):
            return clients, sorted(clients)
    raise DatasetError(f"{path} has no group 'examples' with clients in it.")


def _arrays(clients: h5py.Group, client_id: str) -> list[h5py.Dataset]:
    """Returns a client's pixels and label, not yet read, but of the right types and shapes."""
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
