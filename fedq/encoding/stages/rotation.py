"""Random rotations spread a tensor's energy evenly, so that a quantiser after them wastes no range."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import is_finite, saturate, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.random_numbers import random_signs
from fedq.errors import check_range
from fedq.keys import Key

_CHUNK = 1 << 18  # elements at a time, which stay in the cache


@dataclass(frozen=True)
class Rotation(EncodingStage):
    """The base class of rotations: random signs and an orthonormal transform in blocks, without padding.

    Takes a floating tensor of n elements; gives n numbers (n,) in float32, or float64 for float64. If blocks do not
    fill the tensor, one more block overlaps the last, with fresh signs. Each step is orthogonal, so the rotation is
    orthogonal too. The inverse has a rounding error of a few eps · ‖x‖₂. An Encoder refuses an x whose norm is beyond
    the output's dtype.

    block: the largest number of elements in a block. A small tensor has smaller blocks.
    repeats: rounds, 1 or more. Between two rounds each block is dealt out to all blocks: a value spreads over
        block^repeats elements.
    shared: True: all clients of a round have the same rotation, and their sum is rotated back once. False: each
        client has its own; errors of a biased quantiser are then independent, and average out.
    """

    block: int | None = None
    repeats: int = 1
    shared: bool = True

    unbiased = True

    def __post_init__(self) -> None:
        check_range("block", self.block, 1, integer=True, optional=True)
        check_range("repeats", self.repeats, 1, integer=True)

    @property
    def commutes_with_sum(self) -> bool:
        """True if all clients have the same rotation."""
        return self.shared

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The same number of elements, as a vector."""
        return TensorSpec((spec.numel,), working_dtype(self, spec))

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        flat, size = x.reshape(-1), self._size(x.numel())
        full = len(flat) - len(flat) % size  # the elements in whole blocks
        y = torch.empty(len(flat), dtype=working_dtype(self, TensorSpec.of(x)), device=x.device)
        y[full:] = flat[full:]
        for i in range(self.repeats):
            if i:
                y[:full] = y[:full].view(-1, size).t().reshape(-1)
            signs = self._signs(len(y), i, key, y.device)
            for start, stop, sign in _windows(len(y), size):
                window = y[start:stop]
                source = flat[start:stop] if not i and stop <= full else window
                torch.mul(source, signs[sign : sign + stop - start], out=window)
                self._rotate(window.view(-1, size))
        return y, {}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        size = self._size(spec.numel)
        full = len(y) - len(y) % size

        def inverse(y: Tensor) -> Tensor:
            x = y.clone()
            for i in reversed(range(self.repeats)):
                signs = self._signs(len(x), i, key, x.device)
                for start, stop, sign in reversed(_windows(len(x), size)):
                    self._rotate_back(x[start:stop].view(-1, size))
                    x[start:stop].mul_(signs[sign : sign + stop - start])
                if i:
                    x[:full] = x[:full].view(size, -1).t().reshape(-1)
            return x

        return decoded(inverse, y, spec)

    def _signs(self, n: int, i: int, key: Key, device: torch.device) -> Tensor:
        """Returns the random signs of all blocks in round i of the rotation."""
        size = self._size(n)
        return random_signs(-(-n // size) * size, (key.shared() if self.shared else key).fold(str(i)), device)

    @abstractmethod
    def _size(self, n: int) -> int:
        """Returns the elements in a block of a tensor of n, at least 1."""

    @abstractmethod
    def _rotate(self, rows: Tensor) -> None:
        """Transforms each row, in place."""

    @abstractmethod
    def _rotate_back(self, rows: Tensor) -> None:
        """Inverts `_rotate`, in place."""


@dataclass(frozen=True)
class HadamardRotation(Rotation):
    """The randomised Hadamard transform, in blocks of a power of two (Konečný 2016, §3; Suresh 2017, §3).

    A value v alone in a block of B becomes ±v/√B in every element. For any block, each rotated element is nearly
    normal, of variance ‖block‖²/B. If all blocks have the same energy, uniform quantisation to k levels has a squared
    error of at most ‖x‖² · (2·ln n + 2) / (k − 1)². Without the rotation the error is up to ‖x‖² · n / (2 · (k − 1)²).

    block: a power of two.
    repeats, shared: see Rotation.
    """

    block: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power_of_two("block", self.block)

    def _size(self, n: int) -> int:
        return min(self.block, 1 << max(n.bit_length() - 1, 0))

    def _rotate(self, rows: Tensor) -> None:
        hadamard_(rows)

    _rotate_back = _rotate


@dataclass(frozen=True)
class CosineRotation(Rotation):
    """Random signs, then the orthonormal discrete cosine transform DCT-II, in blocks of any length.

    A value v alone in a block of B becomes at most v·√(2/B) in every element. A Fourier transform of the same length
    computes it (Makhoul 1980). The transform is numpy's, because the bits of torch's depend on the number of threads.

    block: 1 or more. None makes the whole tensor one block, which takes several times as long.
    repeats, shared: see Rotation.
    """

    block: int | None = 4096

    def _size(self, n: int) -> int:
        return max(1, min(self.block or n, n))

    def _rotate(self, rows: Tensor) -> None:
        n = rows.shape[1]
        # scaled first: all numbers stay within about the norm of the row
        v = torch.cat((rows[:, ::2], rows[:, 1::2].flip(1)), 1).mul_(math.sqrt(2 / n))
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinity
            f = torch.view_as_real(torch.from_numpy(np.fft.rfft(v.cpu().numpy()))).to(rows)
        cos, sin = _quarter_wave(rows)
        rows[:, : n // 2 + 1] = f[..., 0] * cos + f[..., 1] * sin
        rows[:, n // 2 + 1 :] = (f[..., 0] * sin - f[..., 1] * cos)[:, 1 : (n + 1) // 2].flip(1)
        rows[:, 0] *= math.sqrt(0.5)

    def _rotate_back(self, rows: Tensor) -> None:
        n = rows.shape[1]
        rows.mul_(math.sqrt(0.5 / n))[:, 0] *= math.sqrt(2)
        low, high = rows[:, : n // 2 + 1], torch.zeros_like(rows[:, : n // 2 + 1])
        high[:, 1:] = rows[:, (n + 1) // 2 :].flip(1)
        cos, sin = _quarter_wave(rows)
        f = torch.complex(low * cos + high * sin, low * sin - high * cos)
        with np.errstate(over="ignore", invalid="ignore"):
            v = torch.from_numpy(np.fft.irfft(f.cpu().numpy(), n, norm="forward")).to(rows)
        rows[:, ::2] = v[:, : (n + 1) // 2]
        rows[:, 1::2] = v[:, (n + 1) // 2 :].flip(1)


def check_power_of_two(name: str, value: int) -> None:
    """Raises ValueError unless `value`, 1 or more, is a power of two."""
    if value & (value - 1):
        raise ValueError(f"{name} must be a power of two, not {value}")


def hadamard_(rows: Tensor) -> None:
    """Multiplies each row by the orthonormal Hadamard matrix, in place. The length of a row is a power of two."""
    bits = rows.shape[1].bit_length() - 1
    # the matrix is a Kronecker product of two small ones
    left, right = (_hadamard_matrix(k).to(rows) for k in (bits // 2, bits - bits // 2))
    blocks = rows.view(-1, len(left), len(right))
    torch.matmul(left, (rows.view(-1, len(right)) @ right).view_as(blocks), out=blocks)


@cache
def _hadamard_matrix(bits: int) -> Tensor:
    """Returns the orthonormal Hadamard matrix of 2^bits rows, in Sylvester's order."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(len(h))


def _quarter_wave(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cosine and the sine of πk / 2n for k = 0 … ⌊n/2⌋, where n is the length of a row."""
    angle = torch.arange(rows.shape[1] // 2 + 1, dtype=torch.float64) * (math.pi / (2 * rows.shape[1]))
    return angle.cos().to(rows), angle.sin().to(rows)


def decoded(inverse: Callable[[Tensor], Tensor], y: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the tensor of `spec` that a linear `inverse` makes of `y`, clamped to the dtype's range.

    A quantised or hostile `y` may be larger than any rotated tensor of `spec`.
    """
    x, limit = inverse(y), torch.finfo(spec.dtype).max
    if not is_finite(x):
        x = inverse(y * 2**-40).clamp_(-limit * 2**-40, limit * 2**-40).mul_(2.0**40)
    if x.dtype != spec.dtype:
        x = saturate(x, spec.dtype)
    return x.view(spec.shape)


def _windows(n: int, size: int) -> list[tuple[int, int, int]]:
    """Returns start, stop and the index of the first sign for each group of blocks that fits into the cache."""
    full, step = n - n % size, max(1, _CHUNK // size) * size
    windows = [(start, min(start + step, full), start) for start in range(0, full, step)]
    return windows + [(n - size, n, full)] * (n > full)
