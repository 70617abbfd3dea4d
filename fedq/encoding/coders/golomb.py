"""Golomb codes, of integers and of gaps in a mask."""

import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.bit_stream import BitReader, from_natural, gaps, planes, read, to_natural, unary, write
from fedq.encoding.coders.coder import Coder, checked
from fedq.encoding.schema import TensorSpec

_BITMAP = 255  # the first byte of a mask that is sent as a bitmap


@dataclass(frozen=True)
class Golomb(Coder):
    """Golomb's code (1966), the best prefix code of integers whose probabilities fall geometrically.

    An integer v from 0 is written as ⌊v / m⌋ in unary and v mod m in truncated binary (see bit_stream.py for the
    order). The divisor m follows from the symbols' mean (Gallager and van Voorhis 1975). The first byte holds m, at
    most 9 % above the best divisor. Takes symbols of any number of levels, or any integers of 32 bits. A negative
    integer v counts as 2·|v| − 1, any other as 2·v. Geometric symbols take at most 0.05 bits more than their entropy
    from a mean of 2 on, and 0.11 from a mean of 1 on. A symbol takes at least one bit.
    """

    def encode(self, symbols: Tensor, spec: TensorSpec) -> bytes:
        """Raises ValueError for a symbol out of range."""
        values = to_natural(symbols, spec)
        index = _divisor_index(int(values.sum()), len(values))
        return bytes([index]) + _encode(values, _divisor(index))

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        if not 1 <= len(data) <= 1 + 5 * spec.numel or data[0] > 252:
            raise ValueError(f"{len(data)} bytes are no Golomb code of {spec.numel} symbols")
        return from_natural(_decode(data[1:], spec.numel, _divisor(data[0])), spec)


@dataclass(frozen=True)
class SparseMask(Coder):
    """The gaps between the ones of a mask (two levels) in Golomb's code, or a bitmap, whichever is shorter.

    The first byte holds m, or 255 for a bitmap; the number of ones (uint32) follows it in front of gaps. If more than
    half are ones, the gaps are between zeros. Random masks of n elements with k ones take at most 3 % and 7 bytes more
    than their entropy, log₂(n over k) bits. For example, 10 ones of 100,000 elements take up to 24 bytes instead of 18.
    With 36 to 40 % ones (or zeros) they take up to 4.4 % and 7 bytes more. The best divisor is then 1, and the code
    equals a bitmap.
    """

    needs_levels = True

    def encode(self, symbols: Tensor, spec: TensorSpec) -> bytes:
        """Raises ValueError for a symbol out of range."""
        if spec.levels != 2:
            raise ValueError(f"SparseMask takes symbols of 2 levels, not {spec.levels}")
        bits, n = checked(symbols, 0, 1).astype(np.bool_), spec.numel
        ones = int(np.count_nonzero(bits))
        rarer = min(ones, n - ones)
        index = _divisor_index(n - rarer, rarer)
        if _divisor(index) > 1 or not rarer:
            places = np.flatnonzero(bits if ones <= n // 2 else ~bits)
            code = struct.pack("<BI", index, ones) + _encode(gaps(places), _divisor(index))
            if len(code) <= -(-n // 8):
                return code
        return bytes([_BITMAP]) + np.packbits(bits, bitorder="little").tobytes()

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        n = spec.numel
        if not 1 <= len(data) <= 1 + -(-n // 8):
            raise ValueError(f"{len(data)} bytes are no mask of {n} elements")
        if data[0] == _BITMAP:
            mask = np.unpackbits(np.frombuffer(data[1:], np.uint8), bitorder="little")
            if len(mask) < n or mask[n:].any():
                raise ValueError(f"a bitmap of {n} elements is cut, or has ones after the last element")
            mask = mask[:n]
        else:
            index, ones = struct.unpack_from("<BI", data.tobytes().ljust(5, b"\xff"))
            if len(data) < 5 or ones > n or index > 252:
                raise ValueError(f"a mask of {n} elements has not {ones} ones")
            rarer, common = int(ones <= n // 2), int(ones > n // 2)
            between = _decode(data[5:], min(ones, n - ones), _divisor(index))
            places = np.cumsum(between, dtype=np.int64) + np.arange(len(between))
            if len(places) and int(places[-1]) >= n:
                raise ValueError(f"a mask of {n} elements has no element {places[-1]}")
            mask = np.full(n, common, np.uint8)
            mask[places] = rarer
        return torch.from_numpy(mask).to(spec.dtype).reshape(spec.shape)


def _divisor(index: int) -> int:
    """Returns the divisor of a byte: steps of at most 9 %, up to 2³²."""
    return int(2 ** (index / 8))


def _divisor_index(total: int, n: int) -> int:
    """Returns the byte of the smallest divisor not below the best one, for n geometric integers of sum `total`."""
    if not total or not n:
        return 0
    mean = total / n  # with θ = mean / (1 + mean): the smallest m with θᵐ + θᵐ⁺¹ ≤ 1
    best = math.ceil((math.log1p(2 * mean) - math.log1p(mean)) / math.log1p(1 / mean))
    return math.ceil(8 * math.log2(max(best, 1)))


def _encode(values: np.ndarray, divisor: int) -> bytes:
    """Returns the code of `values` (uint32 or int64)."""
    width = (divisor - 1).bit_length()
    short = (1 << width) - divisor  # the number of remainders that take one bit less

    def code(block: np.ndarray) -> list[np.ndarray]:
        if not width:
            return [unary(block)]
        quotients = block // divisor
        remainders = block - quotients * divisor
        long = np.flatnonzero(remainders >= short)
        last = remainders.take(long) + short
        remainders[long] = last >> 1
        return [unary(quotients), *planes(remainders, width - 1), *planes(last, 1)]

    return write(values, code)


def _decode(data: memoryview, n: int, divisor: int) -> np.ndarray:
    """Inverts `_encode`: returns n integers (uint32)."""
    width = (divisor - 1).bit_length()
    short = (1 << width) - divisor

    def decode(reader: BitReader, n: int) -> np.ndarray:
        quotients = reader.unary(n)
        if not width:
            return quotients
        remainders = reader.planes(n, width - 1)
        long = np.flatnonzero(remainders >= short)
        remainders[long] += remainders.take(long) - short + reader.planes(len(long), 1)
        remainders += quotients * divisor
        return remainders

    return read(data, n, decode)
