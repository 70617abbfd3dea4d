"""Datasets in LEAF's JSON files: users with their examples (Caldas et al., "LEAF", 2018)."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedq.data.characters import VOCABULARY, sequences, tokens
from fedq.data.dataset import Client, Examples, pooled
from fedq.data.download import DatasetError
from fedq.errors import check_range

_USER_DATA = re.compile(r'"user_data"\s*:\s*\{')
_BETWEEN = re.compile(r"[\s:,]*")


class _Place(NamedTuple):
    """The place of a user's x and y: bytes `start` to `end` of a file.

    examples: number of examples.
    classes: one more than the highest label, 0 for text.
    """

    file: Path
    start: int
    end: int
    examples: int
    classes: int


class Leaf:
    """The users in LEAF's files, which `preprocess.sh` writes to the folders train and test.

    Each file is {"users": […], "num_samples": […], "user_data": {user: {"x": […], "y": […]}}}. The constructor finds
    the place of each user, in about 2 s for 100 MB. Each load reads only the user's part of a file. Clients are
    numbered in the sorted order of the users in train (`client_ids`). If test has the user, too, the client has test
    examples.

    An x is a number, a list of numbers (of any depth) or a text. A y is a label, or the text that follows x. Texts
    become tokens as in `fedq.data.shakespeare`, and y becomes the next tokens.

    path: folder with the folders train and test.
    shape: shape of an x, such as [1, 28, 28]; None for the shape in the file.
    classes: number of labels; None for one more than the highest label. Text needs no number.

    Raises DatasetError, here or in a load, if a file is missing or damaged, or if the users' examples differ in kind or
    shape.
    """

    def __init__(self, path: str, shape: list[int] | None = None, classes: int | None = None) -> None:
        check_range("classes", classes, 1, integer=True, optional=True)
        self._shape, folder = shape, Path(path).expanduser()
        self._train, self._test = (_places(folder / part) for part in ("train", "test"))
        places = [*self._train.values(), *self._test.values()]
        if len({place.classes == 0 for place in places}) > 1:
            raise DatasetError(f"{folder} has labels for some users and text for other users.")
        found = max(place.classes for place in places)
        if classes is not None and classes < found:
            raise ValueError(f"classes must be at least {found}, not {classes}: {folder} has the label {found - 1}.")
        self.num_classes = (classes or found) if found else VOCABULARY
        self.client_ids = sorted(self._train)
        self.num_clients = len(self.client_ids)

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        user = self.client_ids[number]
        place = self._train[user]
        test = partial(self._read, user, self._test[user]) if user in self._test else None
        return Client(number, partial(self._read, user, place), place.examples, test=test)

    def test(self) -> Examples:
        """Returns the test examples of all users, in the sorted order of the users; each call reads the files."""
        return pooled(self._read(user, place) for user, place in sorted(self._test.items()))

    def _read(self, user: str, place: _Place) -> Examples:
        try:
            with place.file.open("rb") as file:
                file.seek(place.start)
                x, y = _checked(json.loads(file.read(place.end - place.start)))
            if not place.classes:
                return pooled(sequences(tokens((a + b).encode())) for a, b in zip(x, y, strict=True))
            array = np.array(x)
            if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
                raise ValueError("x must be finite numbers, or text where y is text")
            inputs = torch.from_numpy(array.astype(np.float32))
            return Examples(inputs.reshape(len(x), *(self._shape or inputs.shape[1:])), torch.tensor(y).long())
        except (
            OSError,
            ValueError,
            TypeError,
            OverflowError,
            RuntimeError,
        ) as error:
            raise DatasetError(f"{place.file}: user {user!r} cannot be read ({error}).") from error


def _places(folder: Path) -> dict[str, _Place]:
    """Returns where each user lies in the files of a folder."""
    places: dict[str, _Place] = {}
    files = sorted(folder.glob("*.json"))
    for file in files:
        try:
            for user, place in _users(file):
                if user in places:
                    raise ValueError(f"user {user!r} is also in {places[user].file}")
                places[user] = place
        except (OSError, ValueError, TypeError, OverflowError, IndexError, RecursionError) as error:
            raise DatasetError(f"{file} is not a readable file of LEAF ({error}).") from error
    if not places:
        raise DatasetError(f"{folder} must hold LEAF's .json files with users in them.")
    return places


def _users(file: Path) -> Iterator[tuple[str, _Place]]:
    """Yields each user of a file with at least one example."""
    data = file.read_bytes()
    text, decode = data.decode("latin-1"), json.JSONDecoder().raw_decode  # one character a byte
    found = _USER_DATA.search(text)
    if not found:
        raise ValueError("user_data is missing")
    start = _after(text, found.end())
    while text[start] != "}":
        _, end = decode(text, start)
        user, start = json.loads(data[start:end]), _after(text, end)
        if not isinstance(user, str):
            raise ValueError(f"a user must be a text, not {user!r}")
        value, end = decode(text, start)
        try:
            x, y = _checked(value)
        except ValueError as error:
            raise ValueError(f"user {user!r}: {error}") from error
        if x:
            yield user, _Place(file, start, end, len(x), 0 if isinstance(y[0], str) else 1 + int(max(y)))
        start = _after(text, end)


def _after(text: str, place: int) -> int:
    """Returns the place of the next character other than space, colon and comma."""
    return _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # the pattern matches everywhere


def _checked(value: Any) -> tuple[list[Any], list[Any]]:
    """Returns x and y of a user. Raises ValueError unless y are labels, or x and y are texts."""
    if not (isinstance(value, dict) and isinstance(value.get("x"), list) and isinstance(value.get("y"), list)):
        raise ValueError("x and y must be lists")
    x, y = value["x"], value["y"]
    if len(x) != len(y):
        raise ValueError(f"{len(x)} x but {len(y)} y")
    if all(isinstance(text, str) for text in (*x, *y)):
        return x, y
    for label in y:
        if not isinstance(label, int | float) or not 0 <= label < 2**31 or label != int(label):
            raise ValueError(f"y must be labels from 0 to 2^31 - 1, or text if x is text, not {label!r}")
    return x, y
