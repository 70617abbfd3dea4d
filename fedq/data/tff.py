"""Datasets in TensorFlow Federated's files: HDF5, one group a client, read client by client."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from h5py import h5f
from torch import Tensor

from fedq.data.dataset import Client, Examples, pooled
from fedq.data.download import DatasetError, obtain
from fedq.errors import check_range

LARGEST = 2**28
"""Largest number of bytes of an array that is read. A sparse array of HDF5 takes fewer bytes in its file."""

URL = "https://storage.googleapis.com/tff-datasets-public/"

Layout = Mapping[str, tuple[type, tuple[int, ...]]]
"""The arrays of a client: name → (type of the elements, shape of a row). The type `bytes` stands for strings."""


def folder_of(path: str | None, archive: str, sha256: str, files: tuple[str, ...]) -> Path:
    """Returns the folder of `files`. Without a `path`, missing files are downloaded into the cache folder.

    archive: the name of the archive that holds the files, without .tar.bz2.
    sha256: the archive's SHA-256, in hexadecimal.
    """
    return obtain(f"{URL}{archive}.tar.bz2", sha256, files) if path is None else Path(path).expanduser()


class ClientsFile:
    """The clients of one HDF5 file. A client's arrays lie at `examples/<client id>/<name>`.

    The file stays open. Any thread may read.

    Args:
        path: the file.
        layout: the arrays that each client has.

    Attributes:
        ids: the clients' ids in sorted order: numpy bytes, shape (clients,).

    Raises DatasetError if the file is missing or damaged, or has no clients.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        if not path.is_file():
            raise DatasetError(f"{path} is missing.")
        self._path, self._layout = path, layout
        names: list[bytes] = []
        with _reading(str(path)):
            self._clients = h5py.File(path, "r").get("examples")
            if isinstance(self._clients, h5py.Group):
                self._clients.id.links.iterate(
                    names.append
                )  # in sorted order; h5py's own iteration takes twice as long
        if not names:
            raise DatasetError(f"{path} has no group 'examples' with clients.")
        self.ids = np.array(names)

    def where(self, client_id: bytes) -> str:
        """Returns the place of a client in words, for errors."""
        return f"{self._path}: client {client_id.decode(errors='backslashreplace')!r}"

    def rows(self, client_id: bytes) -> int:
        """Returns the client's number of rows, or 0 if its first array is missing."""
        with _reading(self.where(client_id)):
            array = self._clients.get(client_id + b"/" + next(iter(self._layout)).encode())
        return array.shape[0] if isinstance(array, h5py.Dataset) and array.shape else 0

    def read(self, client_id: bytes, most: int | None = None) -> list[np.ndarray]:
        """Returns the client's arrays, in the layout's order, with at most `most` rows.

        Arrays of the type `bytes` have Python's bytes as elements, shape (N,).
        Raises DatasetError if an array is missing, damaged, unlike the layout or too large, or if the numbers of rows
        differ.
        """
        where = self.where(client_id)
        with _reading(where):
            arrays = [self._clients.get(client_id + b"/" + name.encode()) for name in self._layout]
            for array, (name, (kind, shape)) in zip(arrays, self._layout.items(), strict=True):
                if not isinstance(array, h5py.Dataset):
                    raise DatasetError(f"{where} has no array '{name}'.")
                if array.external or array.is_virtual or h5f.get_name(array.id) != h5f.get_name(self._clients.id):
                    raise DatasetError(f"{where} has '{name}' in another file, which is not read.")
                if not _is_of(array.dtype, kind) or not array.shape or array.shape[1:] != shape:
                    found = f"{array.dtype} {array.shape}"
                    raise DatasetError(f"{where} has '{name}' as {found}, not {kind.__name__} {('N', *shape)}.")
            if len({len(array) for array in arrays}) > 1:
                found = " and ".join(
                    f"{len(array)} of '{name}'" for array, name in zip(arrays, self._layout, strict=True)
                )
                raise DatasetError(f"{where} has {found}.")
            for array, name in zip(arrays, self._layout, strict=True):
                rows = len(array) if most is None else min(len(array), most)
                if (size := rows * math.prod(array.shape[1:]) * array.dtype.itemsize) > LARGEST:
                    raise DatasetError(f"{where} has {size:,} bytes of '{name}': at most {LARGEST:,} are read.")
            return [array[:most] for array in arrays]


class TffDataset(ABC):
    """A dataset in a train file and a test file. A subclass turns a client's arrays into examples.

    Clients are numbered in the sorted order of their ids in the train file. Each load reads the client from the file,
    in any thread. If the test file has a client's id, too, the client has test examples. `test()` reads the clients of
    the test file, in the sorted order of their ids.

    Args:
        path: folder of the files. None means the cache folder; missing files are downloaded into it.
        name: name of the archive. The files are `<name>_<part>.h5`.
        sha256: the archive's SHA-256, in hexadecimal.
        layout: the arrays that each client has.
        parts: names of the parts, including `train` and `test`; each part is one file.
        client_examples: number of a client's first examples that are used, 1 or more; None means all.
        test_examples: largest number of examples of `test()`, 1 or more; None means all. The examples are of clients at
            equal distances.

    Raises ValueError if a limit is below 1. Raises DatasetError, here or in a load, if a file is missing or damaged.
    """

    num_classes: int

    def __init__(
        self,
        path: str | None,
        name: str,
        sha256: str,
        layout: Layout,
        parts: tuple[str, ...] = ("train", "test"),
        client_examples: int | None = None,
        test_examples: int | None = None,
    ) -> None:
        check_range("client_examples", client_examples, 1, integer=True, optional=True)
        check_range("test_examples", test_examples, 1, integer=True, optional=True)
        files = tuple(f"{name}_{part}.h5" for part in parts)
        folder = folder_of(path, name, sha256, files)
        self._parts = {part: ClientsFile(folder / file, layout) for part, file in zip(parts, files, strict=True)}
        self._client_examples, self._test_examples = client_examples, test_examples
        self.num_clients = len(self._parts["train"].ids)

    @property
    def client_ids(self) -> list[str]:
        """The clients' ids, in the order of their numbers."""
        return [client_id.decode(errors="backslashreplace") for client_id in self._parts["train"].ids.tolist()]

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        train, test = self._parts["train"], self._parts["test"]
        client_id = bytes(train.ids[number])
        place = int(np.searchsorted(test.ids, client_id))
        own_test = test.ids[place : place + 1].tolist() == [client_id]
        return Client(
            number,
            partial(self._load, train, client_id, self._client_examples),
            self._count(train, client_id),
            test=partial(self._load, test, client_id, self._client_examples) if own_test else None,
        )

    def test(self) -> Examples:
        """Returns the test examples; each call reads the file."""
        return self._pooled(self._parts["test"])

    @abstractmethod
    def _examples(self, where: str, *arrays: np.ndarray) -> Examples:
        """Returns the examples in a client's arrays, in the order of the rows. `where` is for errors."""

    def _count(self, file: ClientsFile, client_id: bytes) -> int:
        return min(file.rows(client_id), self._client_examples or 2**63)

    def _labels(self, where: str, label: np.ndarray) -> Tensor:
        """Returns class labels as int64. Raises DatasetError if a label is out of range."""
        if not ((label >= 0) & (label < self.num_classes)).all():
            raise DatasetError(f"{where} has labels outside 0 to {self.num_classes - 1}.")
        return torch.from_numpy(label.astype(np.int64))

    def _load(self, file: ClientsFile, client_id: bytes, most: int | None) -> Examples:
        x, y = self._examples(file.where(client_id), *file.read(client_id, most))
        return Examples(x[:most], y[:most])

    def _pooled(self, file: ClientsFile) -> Examples:
        """Returns the examples of all clients of a file, or as many as `test_examples` allows."""
        limit = self._test_examples
        clients = min(len(file.ids), -(-limit // 10) if limit else len(file.ids))  # a read takes half a millisecond
        chosen = file.ids[np.arange(clients) * len(file.ids) // clients].tolist()
        each = limit and -(-limit // clients)
        x, y = pooled(self._load(file, client_id, each) for client_id in chosen)
        return Examples(x[:limit], y[:limit])


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:  # h5py: damaged files
        raise DatasetError(f"{where} cannot be read ({error}).") from error


def _is_of(dtype: np.dtype, kind: type) -> bool:
    if kind is bytes:
        return h5py.check_string_dtype(dtype) is not None
    return dtype.isnative and np.issubdtype(dtype, kind)
