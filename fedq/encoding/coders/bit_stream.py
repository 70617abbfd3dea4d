"""Bits of prefix codes as arrays, for the coders of integers and masks.

A prefix code usually writes a unary and a binary part for each symbol in turn, and is read in a loop. Here, in each
block of 16,384 symbols, all unary parts stand first and all binary parts follow. The number of bits is the same, and
both directions are a few array operations. Bits fill bytes from the least significant; zeros fill the last byte of a
block.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.coders.coder import Buffer, checked, limits
from fedq.encoding.schema import TensorSpec

_BLOCK = 1 << 14  # symbols at a time, which stay in the cache
_MOST = (1 << 32) - 1  # the largest symbol
_STRETCH = 64  # bytes whose ones are counted together
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # of each byte


def write(values: np.ndarray, code: Callable[[np.ndarray], list[np.ndarray]]) -> bytes:
    """Returns the bytes of the bits (arrays of 0 and 1) that `code` returns for each block of `values`."""
    blocks = (np.concatenate(code(values[i : i + _BLOCK])) for i in range(0, len(values), _BLOCK))
    return b"".join(np.packbits(bits, bitorder="little").tobytes() for bits in blocks)


def read(data: Buffer, n: int, decode: Callable[["BitReader", int], np.ndarray]) -> np.ndarray:
    """Inverts `write`: returns n integers (uint32).

    `decode` reads a block of a given number of integers. Raises ValueError if bits are missing or left over, or if the
    padding of a block is not zero. Raises ValueError also if an integer has more than 32 bits.
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
    """Returns the bits of `counts`, integers from 0: for each, as many zeros, then a one."""
    ends = np.cumsum(counts, dtype=np.int64)
    ends += np.arange(len(ends))
    bits = np.zeros(int(ends[-1]) + 1, np.uint8)
    bits[ends] = 1
    return bits


def planes(values: np.ndarray, widths: np.ndarray | int) -> list[np.ndarray]:
    """Returns the `widths` lowest bits of each of `values`: all lowest bits, then all second bits, and so on."""
    pieces = []
    for bit in range(int(np.max(widths, initial=0))):
        if isinstance(widths, np.ndarray):
            longer = np.flatnonzero(widths > bit)
            values, widths = values.take(longer), widths.take(longer)
        pieces.append(((values >> bit) & 1).astype(np.uint8))
    return pieces


def gaps(places: np.ndarray) -> np.ndarray:
    """Returns the number of places between each of rising `places` and the place before, or the start."""
    between = places.copy()
    between[1:] -= places[:-1]
    between[1:] -= 1
    return between


class BitReader:
    """Reads the bytes of `write` in order. Raises ValueError if bits are missing."""

    def __init__(self, data: Buffer) -> None:
        self._bytes, self._position = np.frombuffer(data, np.uint8), 0
        ones = np.zeros((-(-len(self._bytes) // _STRETCH), _STRETCH), np.uint8)
        ones.reshape(-1)[: len(self._bytes)] = _ONES[self._bytes]
        self._ones = ones.sum(1, dtype=np.int64).cumsum()  # up to the end of each stretch

    def unary(self, n: int) -> np.ndarray:
        """Reads n counts (int64), at the start of a block."""
        first = self._position // 8
        stretch = first // _STRETCH
        before = int(self._ones[stretch - 1]) if stretch else 0
        before += int(_ONES[self._bytes[stretch * _STRETCH : first]].sum(dtype=np.int64))
        if (there := (int(self._ones[-1]) if len(self._ones) else 0) - before) < n:
            raise ValueError(f"{n} unary numbers are expected, {there} are left")
        last = int(np.searchsorted(self._ones, before + n))  # the stretch of the n-th one
        part = self._bytes[first : (last + 1) * _STRETCH]
        some = np.flatnonzero(part) if len(part) > n else slice(None)  # in hostile bytes ones may lie far apart
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
        """Skips to the next whole byte. Raises ValueError unless the skipped bits are zero."""
        if self._take(-self._position % 8).any():
            raise ValueError("the unused bits of a block's last byte are not zero")

    def close(self) -> None:
        """Raises ValueError if bytes are left."""
        if self._position < len(self._bytes) * 8:
            raise ValueError("there are bytes after the last symbol")

    def _take(self, n: int) -> np.ndarray:
        first, skipped = divmod(self._position, 8)
        self._position += n
        if self._position > len(self._bytes) * 8:
            raise ValueError("the bits end before the last symbol")
        bits = np.unpackbits(self._bytes[first : -(-self._position // 8)], bitorder="little")
        return bits[skipped : skipped + n]


def to_natural(symbols: Tensor, spec: TensorSpec) -> np.ndarray:
    """Returns integers 0 … 2³² − 1 (uint32, shape (n,)) for `symbols`.

    With levels, or in an unsigned dtype, symbols do not change. Other symbols 0, −1, 1, −2, 2 … become 0, 1, 2, 3, 4
    …. Raises ValueError for a symbol out of range.
    """
    low, high = limits(spec, _MOST)
    values = checked(symbols, low, high)
    if low == 0:
        return values.astype(np.uint32)
    signed = values.astype(np.int32)
    return ((signed << 1) ^ (signed >> 31)).view(np.uint32)


def from_natural(values: np.ndarray, spec: TensorSpec) -> Tensor:
    """Inverts `to_natural`. Raises ValueError for integers that it never returns."""
    low, high = limits(spec, _MOST)
    if int(values.max(initial=0)) > high - low:
        raise ValueError(f"a symbol is not from {low} to {high}")
    if low < 0:
        values = (values >> 1).view(np.int32) ^ -(values & 1).view(np.int32)
    return torch.from_numpy(values).to(spec.dtype).reshape(spec.shape)
