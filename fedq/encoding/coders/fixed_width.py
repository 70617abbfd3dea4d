"""Fixed width: every symbol takes the same number of bits, without gaps."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.coder import Buffer, Coder, checked
from fedq.encoding.schema import TensorSpec


@dataclass(frozen=True)
class FixedWidth(Coder):
    """Packs symbols below `levels` into ⌈log₂ levels⌉ bits each, least significant bit first.

    n symbols of b bits take ⌈n·b / 8⌉ bytes: a tensor wastes less than one byte. If `levels` is a power of two, the
    rate is the entropy of uniform symbols; else it is up to 1 bit a symbol above. Raises ValueError without levels.
    """

    needs_levels = True

    @override
    def size(self, spec: TensorSpec) -> int:
        return -(-spec.numel * _width(spec) // 8)

    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        """Raises ValueError for a symbol out of range: it would change its neighbours."""
        width, values = _width(spec), checked(symbols, 0, (spec.levels or 0) - 1)
        if width in (8, 16):
            return np.ascontiguousarray(values, f"<u{width // 8}").view(np.uint8).data
        if width == 1:
            return np.packbits(values, bitorder="little").data
        if width in (2, 4):
            padded = np.zeros(self.size(spec) * (8 // width), np.uint8)
            padded[: len(values)] = values
            words = padded.view(f"<u{8 // width}")  # the lowest byte of each word remains
            for shift, _ in _folds(width):
                words = words | words >> shift
            return words.astype(np.uint8).data
        group, stride = _group(width)
        groups = -(-len(values) // group)
        padded = np.zeros((groups, group), np.uint8 if width < 8 else np.uint32)
        padded.reshape(-1)[: len(values)] = values
        packed = np.zeros((groups, stride), np.uint8)
        for symbol, byte, shift in _overlaps(width):
            column: np.ndarray = padded[:, symbol]
            packed[:, byte] |= (column << shift if shift >= 0 else column >> -shift).astype(np.uint8)
        return packed.reshape(-1)[: self.size(spec)].data

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        width, n = _width(spec), spec.numel
        dtype = np.uint8 if width <= 8 else np.uint32
        if width in (8, 16):
            values = np.frombuffer(data, f"<u{width // 8}").astype(dtype)
        elif width == 1:
            values = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        elif width in (2, 4):
            words = np.frombuffer(data, np.uint8).astype(f"<u{8 // width}")
            for shift, mask in reversed(_folds(width)):
                words = (words | words << shift) & words.dtype.type(mask)
            values = words.view(np.uint8)
        else:
            group, stride = _group(width)
            packed = np.zeros((-(-n // group), stride), np.uint8)
            packed.reshape(-1)[: len(data)] = data
            unpacked = np.zeros((len(packed), group), dtype)
            for symbol, byte, shift in _overlaps(width):
                bits: np.ndarray = packed[:, byte].astype(dtype)
                unpacked[:, symbol] |= bits >> shift if shift >= 0 else bits << -shift
            unpacked &= dtype((1 << width) - 1)
            values = unpacked.reshape(-1)
        if values[n:].any():
            raise ValueError("the unused bits of the last byte are not zero")
        values = values[:n]
        if n and spec.levels != 1 << width and int(values.max()) >= (spec.levels or 0):
            raise ValueError(f"a symbol is not below {spec.levels}")
        return torch.from_numpy(values.view(np.uint8 if width <= 8 else np.int32)).to(spec.dtype).reshape(spec.shape)


def _width(spec: TensorSpec) -> int:
    if spec.levels is None or not 1 <= spec.levels <= 1 << 16:
        raise ValueError(f"FixedWidth packs symbols of 1 to 65,536 levels, not {spec.levels}")
    return max(1, (spec.levels - 1).bit_length())


def _folds(width: int) -> list[tuple[int, int]]:
    """Lists the right shifts that pack a word of 8 / width symbols, one a byte, into its lowest byte.

    Each shift doubles the number of symbols side by side, from k to 2k. Each shift has the mask of groups of k.
    """
    word = 64 // width
    return [
        (k * (8 - width), sum((1 << k * width) - 1 << place for place in range(0, word, 8 * k)))
        for k in (1, 2, 4)
        if 2 * k * width <= 8
    ]


def _group(width: int) -> tuple[int, int]:
    """Returns the smallest number of symbols that fills whole bytes, and the number of bytes."""
    bits = math.lcm(width, 8)
    return bits // width, bits // 8


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """Lists symbol, byte, and left shift from symbol to byte, for all pairs that share a bit in a group."""
    group, stride = _group(width)
    return [
        (symbol, byte, symbol * width - byte * 8)
        for symbol in range(group)
        for byte in range(stride)
        if symbol * width < byte * 8 + 8 and byte * 8 < symbol * width + width
    ]
