"""Random numbers of stages, from the bits of a key's stream."""

import numpy as np
import torch
from torch import Tensor

from fedq.keys import Key


def random_integers(bits: np.random.SFC64, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns integers of random bits, in the shape and on the device of `like`.

    For r of 16 bits, (r + ½) / 2¹⁶ is uniform in (−½, ½).
    """
    n, size = like.numel(), dtype.itemsize
    words = bits.random_raw(-(-n * size // 8)).view(f"<i{size}")[:n]
    return torch.from_numpy(words).to(like.device).view(like.shape)


def stochastic_round_(x: Tensor, bits: np.random.SFC64) -> Tensor:
    """Rounds `x` ≥ 0 in place: up with the fraction as probability (to 2⁻²⁴), else down. 0 stays 0."""
    random = random_integers(bits, x, torch.int32).bitwise_right_shift_(8)
    return x.add_(random, alpha=2**-24).add_(0.5).floor_()


def random_signs(n: int, key: Key, device: torch.device) -> Tensor:
    """Returns n signs of 1 and −1 (int8, shape (n,)): one bit of the key's stream each, least significant first."""
    bits = np.unpackbits(key.bits(-(-n // 8), 8), count=n, bitorder="little").view(np.int8)
    return (1 - 2 * torch.from_numpy(bits)).to(device)
