"""Questions and answers of Stack Overflow by user, in TensorFlow Federated's files."""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from fedq.data.dataset import Examples
from fedq.data.download import DatasetError
from fedq.data.tff import TffDataset, folder_of
from fedq.errors import check_range

SHA256 = "99eca2f8b8327a09e5fc123979df2d237acbc5e52322f6d86bf523ee47b961a2"
WORD_COUNT_SHA256 = "1dc00256d6e527c54b9756d968118378ae14e6692c0b3b6cad470cdd3f0c519c"
LAYOUT = {"tokens": (bytes, ())}
LENGTH = 20  # words of a sentence (Reddi 2021, §C)


class StackOverflow(TffDataset):
    """The next word in sentences of 342,477 users of Stack Overflow (Reddi 2021, §C).

    The files are `stackoverflow_train.h5`, `stackoverflow_held_out.h5`, `stackoverflow_test.h5` and
    `stackoverflow.word_count`. Each client has `tokens` (strings, N): one sentence a row, words separated by blanks.

    x and y are ids, int64, (N, 20). 0 is padding. 1 to `words` are the most frequent words. `words` + 1 is any other
    word, `words` + 2 begins a sentence, and `words` + 3 ends a sentence. Sentences are cut after 20 words. Only shorter
    sentences have an end id.

    Args:
        path: folder of the files. None means the cache folder; missing files are downloaded into it.
        words: number of words in the vocabulary, at least 1.
        client_examples: number of a client's first sentences that are used, 1 or more; None means all.
        test_examples: largest number of sentences of `test()` and of `validation()`, 1 or more; None means all. The
            sentences are of clients at equal distances.

    Raises ValueError if an argument is out of range. Raises DatasetError, here or in a load, if a file is missing or
    damaged.
    """

    def __init__(
        self,
        path: str | None = None,
        words: int = 10_000,
        client_examples: int | None = 1000,
        test_examples: int | None = 10_000,
    ) -> None:
        check_range("words", words, 1, integer=True)
        parts = ("train", "held_out", "test")
        super().__init__(path, "stackoverflow", SHA256, LAYOUT, parts, client_examples, test_examples)
        counts = "stackoverflow.word_count"
        self._ids = _vocabulary(folder_of(path, counts, WORD_COUNT_SHA256, (counts,)) / counts, words)
        self._other, self._begin, self._end = words + 1, words + 2, words + 3
        self.num_classes = words + 4

    def validation(self) -> Examples:
        """Returns the examples of the users in the held-out file, who are not clients; each call reads the file."""
        return self._pooled(self._parts["held_out"])

    @override
    def _examples(self, where: str, *arrays: np.ndarray) -> Examples:
        ids = torch.zeros((len(arrays[0]), LENGTH + 1), dtype=torch.int64)
        for row, sentence in enumerate(arrays[0]):
            words = [self._ids.get(word, self._other) for word in sentence.split()[:LENGTH]]
            sequence = [self._begin, *words, self._end][: LENGTH + 1]
            ids[row, : len(sequence)] = torch.tensor(sequence)
        return Examples(ids[:, :-1].clone(), ids[:, 1:].clone())


def _vocabulary(path: Path, words: int) -> dict[bytes, int]:
    """Returns the ids of the first `words` words of a file. Each line has a word and its count."""
    try:
        with path.open("rb") as file:
            lines = [line.split() for line in islice(file, words)]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if len(line) != 2 or not line[1].isdigit():
            raise DatasetError(f"{path} has no word and count in line {number}.")
    if len(lines) < words:
        raise DatasetError(f"{path} has {len(lines)} words: set dataset.words to at most {len(lines)}.")
    return {word: number for number, (word, _) in enumerate(lines, 1)}
