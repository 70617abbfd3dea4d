"""Shakespeare's characters as tokens, and token sequences for next-token models."""

import numpy as np
import torch

from fedq.data.dataset import Examples

CHARACTERS = b"dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
"""The 86 characters of TensorFlow Federated's Shakespeare models, in the order of ids 1 to 86. Id 0 is padding."""

OTHER, BEGIN, END = (len(CHARACTERS) + i for i in (1, 2, 3))
"""Ids of all other characters, and of the begin and the end of a text."""

VOCABULARY = len(CHARACTERS) + 4
"""Number of ids."""

LENGTH = 80
"""Tokens of a sequence (McMahan 2016)."""

_IDS = np.full(256, OTHER, np.uint8)
_IDS[np.frombuffer(CHARACTERS, np.uint8)] = np.arange(1, len(CHARACTERS) + 1)


def tokens(text: bytes) -> np.ndarray:
    """Returns the id of each byte of `text`, uint8, shape (N,)."""
    return _IDS[np.frombuffer(text, np.uint8)]


def sequences(ids: np.ndarray, length: int = LENGTH) -> Examples:
    """Cuts a text (N,) into sequences: inputs x and next tokens y, int64, shape (⌈(N − 1) / length⌉, length) each.

    Each token except the first is a target once. The last sequence is padded with 0.
    """
    rows = -(-max(len(ids) - 1, 0) // length)
    padded = torch.zeros(rows * length + 1, dtype=torch.int64)
    padded[: len(ids)] = torch.from_numpy(ids)
    return Examples(padded[:-1].reshape(rows, length).clone(), padded[1:].reshape(rows, length).clone())
