"""Text as tokens of a pretrained model's tokenizer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedq.data.dataset import Examples
from fedq.errors import FedqError, check_range
from fedq.pretrained import from_pretrained

IGNORED = -100
"""The target of padding, as in Hugging Face's libraries: no tokenizer has this id. Needs task.padding=-100."""


class Tokenizer:
    """A tokenizer of Hugging Face, and the length of sequences."""

    def __init__(self, tokenizer: str, length: int) -> None:
        """Loads the tokenizer.

        tokenizer: A name on the hub, a folder, a GGUF file, or PACKAGE:PATH in an installed Python package.
        length: Tokens of a sequence.

        Raises FedqError if the tokenizer cannot be loaded.
        """
        check_range("length", length, 2, integer=True)
        self._tokenizer, self._length = from_pretrained("dataset.tokenizer", "AutoTokenizer", tokenizer), length
        self._name, self.vocabulary = tokenizer, len(self._tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text's tokens, without special tokens such as the start token of a text."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return ids

    def sequences(self, ids: Sequence[int] | Tensor) -> Examples:
        """Cuts a text into sequences: inputs x and next tokens y, int64, shape (⌈(N − 1) / length⌉, length) each.

        Each token except the first is a target once. The last sequence is padded; targets of padding are `IGNORED`.
        """
        rows = -(-max(len(ids) - 1, 0) // self._length)
        y = torch.full((rows * self._length,), IGNORED)
        x = torch.full_like(y, self._tokenizer.pad_token_id or 0)  # no target depends on inputs of padding
        count = max(len(ids) - 1, 0)
        known = torch.as_tensor(ids, dtype=torch.int64)
        x[:count], y[:count] = known[:count], known[1:]
        return Examples(x.reshape(rows, self._length), y.reshape(rows, self._length))

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Returns the first tokens of each text with the tokenizer's special tokens, padded: int64 (N, length).

        Raises FedqError if the tokenizer has no token for padding.
        """
        if self._tokenizer.pad_token_id is None:
            raise FedqError(f"dataset.tokenizer: {self._name} has no padding token: set pad_token in its configuration")
        x = torch.full((len(texts), self._length), self._tokenizer.pad_token_id)
        if texts:
            found = self._tokenizer(list(texts), truncation=True, max_length=self._length).input_ids
            for row, ids in zip(x, found, strict=True):
                row[: len(ids)] = torch.tensor(ids)
        return x
