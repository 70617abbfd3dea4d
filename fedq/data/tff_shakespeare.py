"""Shakespeare's plays by role, in TensorFlow Federated's files."""

import numpy as np
import torch
from typing_extensions import override

from fedq.data.characters import BEGIN, END, VOCABULARY, sequences, tokens
from fedq.data.dataset import Examples
from fedq.data.tff import ClientsFile, TffDataset

SHA256 = "0285be9906cb5f268092eee4edeeacfc2af4574f2941f7cc2f08a321d7f5c707"
LAYOUT = {"snippets": (bytes, ())}


class TffShakespeare(TffDataset):
    """The next character in the speeches of 715 roles in Shakespeare's plays (McMahan 2016; Reddi 2021, §C).

    The files are `shakespeare_train.h5` and `shakespeare_test.h5`. Each client has `snippets` (strings, N): its
    speeches. Speeches are cut into sequences of 80 characters. The last sequence of a speech is padded.

    x and y are ids, int64, (N, 80). 0 is padding, and 1 to 86 are the characters of `CHARACTERS`. 87 is any other byte,
    88 begins a speech, and 89 ends a speech.

    Args:
        path: folder of both files. None means the cache folder; missing files are downloaded into it.
        test_examples: largest number of sequences of `test()`, 1 or more; None means all. The sequences are of clients
            at equal distances.

    Raises ValueError for less than 1 sequence. Raises DatasetError, here or in a load, if a file is missing or damaged.
    """

    num_classes = VOCABULARY

    def __init__(self, path: str | None = None, test_examples: int | None = None) -> None:
        super().__init__(path, "shakespeare", SHA256, LAYOUT, test_examples=test_examples)

    @override
    def _examples(self, where: str, *arrays: np.ndarray) -> Examples:
        texts = [np.concatenate([[BEGIN], tokens(speech), [END]]) for speech in arrays[0]]
        x, y = zip(*map(sequences, [np.empty(0, np.int64), *texts]), strict=True)
        return Examples(torch.cat(x), torch.cat(y))

    @override
    def _count(self, file: ClientsFile, client_id: bytes) -> int:
        return len(self._load(file, client_id, None).y)  # a speech has several sequences
