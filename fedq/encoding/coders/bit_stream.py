"""Bits of prefix codes, as arrays: what the coders of integers and masks are made of.

A prefix code writes a unary part and a binary part for one symbol after another, and can only be read in a loop. Here,
in each block of 16,384 symbols, all unary parts stand first and all binary parts behind them. That takes the same
number of bits, and both directions are a few array operations. Bits fill bytes from the least significant; the last
byte of a block is filled up with zeros.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.coders.coder import Buffer, checked, limits
from fedq.encoding.schema import TensorSpec

_BLOCK = 1 << 14  # symbols worked on at a time: the working set stays in the cache
_MOST = (1 << 32) - 1  # the largest symbol
_STRETCH = 64  # bytes whose ones are counted together
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # of each byte


def write(values: np.ndarray, code: Callable[[np.ndarray], list[np.ndarray]]) -> bytes:
    """Returns the bytes of the bits (uint8) that `code` makes of each block of `values`."""
    blocks = (np.concatenate(code(values[i : i + _BLOCK])) for i in range(0, len(values), _BLOCK))
    return b"".join(np.packbits(bits, bitorder="little").tobytes() for bits in blocks)


def read(data: Buffer, n: int, decode: Callable[["BitReader", int], np.ndarray]) -> np.ndarray:
    """Returns the n integers (uint32) that `write` was given; `decode` reads those of one block, of which it is told.

    Raises ValueError where bits are missing, left over or not zero behind a block, or an integer has over 32 bits.
    """
    reader, values = BitReader(data), np.empty(n, np.uint32)
    for start in range(0, n, _BLOCK):
        block = decode(reader, min(_BLOCK, n - start))
        if int(block.max()) >= 1 << 32:
            raise ValueError("an integer has more than 32 bits")
        values[start : start + _BLOCK] = block
        reader.align()
    reader.close()
    return values


def unary(counts: np.ndarray) -> np.ndarray:
    """Returns the bits of each of `counts`, integers from 0: as many zeros, and a one."""
    ends = np.cumsum(counts, dtype=np.int64)
    ends += np.arange(len(ends))
    bits = np.zeros(int(ends[-1]) + 1, np.uint8)
    bits[ends] = 1
    return bits


def planes(values: np.ndarray, widths: np.ndarray | int) -> list[np.ndarray]:
    """Returns the `widths` lowest bits of each of `values`: all the lowest bits, then all the next, and so on."""
    pieces = []
    for bit in range(int(np.max(widths, initial=0))):
        if isinstance(widths, np.ndarray):
            longer = np.flatnonzero(widths > bit)
            values, widths = values.take(longer), widths.take(longer)
        pieces.append(((values >> bit) & 1).astype(np.uint8))
    return pieces


def gaps(places: np.ndarray) -> np.ndarray:
    """Returns how many lie between each of some rising places and the one before it, or the start."""
    between = places.copy()
    between[1:] -= places[:-1]
    between[1:] -= 1
    return between


class BitReader:
    """Reads in order what `write` wrote. Raises ValueError where there are too few bits."""

    def __init__(self, data: Buffer) -> None:
        self._bytes, self._position = np.frombuffer(data, np.uint8), 0
        ones = np.zeros((-(-len(self._bytes) // _STRETCH), _STRETCH), np.uint8)
        ones.reshape(-1)[: len(self._bytes)] = _ONES[self._bytes]
        self._ones = ones.sum(1, dtype=np.int64).cumsum()  # up to and with each stretch

    def unary(self, n: int) -> np.ndarray:
        """Reads n counts (int64), at the start of a block."""
        first = self._position // 8
        stretch = first // _STRETCH
        before = int(self._ones[stretch - 1]) if stretch else 0
        before += int(_ONES[self._bytes[stretch * _STRETCH : first]].sum(dtype=np.int64))
        if (there := (int(self._ones[-1]) if len(self._ones) else 0) - before) < n:
            raise ValueError(f"{n} numbers in unary are expected, there are {there}")
        last = int(np.searchsorted(self._ones, before + n))  # where the n-th one is
        part = self._bytes[first : (last + 1) * _STRETCH]
        some = np.flatnonzero(part) if len(part) > n else slice(None)  # hostile ones may lie far apart
        ends = np.flatnonzero(np.unpackbits(part[some], bitorder="little").view(np.bool_))[:n]
        if isinstance(some, np.ndarray):
            ends = 8 * some[ends // 8] + ends % 8
        self._position += int(ends[-1]) + 1
        return gaps(ends)

    def planes(self, n: int, widths: np.ndarray | int) -> np.ndarray:
        """Reads n values (int64) of `widths` bits each."""
        values = np.zeros(n, np.int64)
        for bit in range(int(np.max(widths, initial=0))):
            if isinstance(widths, np.ndarray):
                longer = np.flatnonzero(widths > bit)
                values[longer] |= self._take(len(longer)).astype(np.int64) << bit
            else:
                values |= self._take(n).astype(np.int64) << bit
        return values

    def align(self) -> None:
        """Goes on to the next whole byte; the bits between must be zero."""
        if self._take(-self._position % 8).any():
            raise ValueError("the unused bits of a block's last byte are not zero")

    def close(self) -> None:
        """Raises ValueError where something is left."""
        if self._position < len(self._bytes) * 8:
            raise ValueError("there are bytes behind the last symbol")

    def _take(self, n: int) -> np.ndarray:
        first, skipped = divmod(self._position, 8)
        self._position += n
        if self._position > len(self._bytes) * 8:
            raise ValueError("the bits end before the last symbol")
        bits = np.unpackbits(self._bytes[first : -(-self._position // 8)], bitorder="little")
        return bits[skipped : skipped + n]


def to_natural(symbols: Tensor, spec: TensorSpec) -> np.ndarray:
    """Returns integers 0 … 2³² − 1 (uint32, shape (n,)) for `symbols`.

    They are the symbols themselves; without levels, those of signed dtypes are 0, −1, 1, −2, 2 … in that order. Raises
    ValueError for a symbol out of range.
    """
    low, high = limits(spec, _MOST)
    values = checked(symbols, low, high)
    if low == 0:
        return values.astype(np.uint32)
    signed = values.astype(np.int32)
    return ((signed << 1) ^ (signed >> 31)).view(np.uint32)


def from_natural(values: np.ndarray, spec: TensorSpec) -> Tensor:
    """The inverse of `to_natural`; raises ValueError for what it never gives."""
    low, high = limits(spec, _MOST)
    if int(values.max(initial=0)) > high - low:
        raise ValueError(f"a symbol is not from {low} to {high}")
    if low < 0:
        values = (values >> 1).view(np.int32) ^ -(values & 1).view(np.int32)
    return torch.from_numpy(values).to(spec.dtype).reshape(spec.shape)
