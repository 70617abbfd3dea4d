"""Elias's universal codes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.bit_stream import BitReader, from_natural, planes, read, to_natural, unary, write
from fedq.encoding.coders.coder import Coder
from fedq.encoding.schema import TensorSpec
from fedq.errors import check_choice

Code = Literal["gamma", "delta"]


@dataclass(frozen=True)
class Elias(Coder):
    """Elias's gamma or delta code (1975), for falling probabilities. No table is sent.

    An integer x from 1 takes 2⌊log₂ x⌋ + 1 bits in gamma, and ⌊log₂ x⌋ + 2⌊log₂(⌊log₂ x⌋ + 1)⌋ + 1 in delta. Delta is
    shorter from x = 32 on. A symbol s is coded as x = s + 1. Takes symbols of any number of levels, or any integers of
    32 bits. A negative integer v counts as s = 2·|v| − 1, any other as 2·v.

    code: "gamma" or "delta".
    """

    code: Code = "gamma"

    def __post_init__(self) -> None:
        check_choice("code", self.code, Code)

    def encode(self, symbols: Tensor, spec: TensorSpec) -> bytes:
        """Raises ValueError for a symbol out of range."""
        return write(to_natural(symbols, spec), self._code)

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        if len(data) > 9 * spec.numel:  # the longest code has 65 bits
            raise ValueError(f"{len(data)} bytes are no Elias code of {spec.numel} symbols")
        return from_natural(read(data, spec.numel, self._decode), spec)

    def _code(self, block: np.ndarray) -> list[np.ndarray]:
        values = block.astype(np.int64) + 1
        widths = _log2(values)
        if self.code == "gamma":
            return [unary(widths), *planes(values, widths)]
        lengths = _log2(widths + 1)
        return [unary(lengths), *planes(widths + 1, lengths), *planes(values, widths)]

    def _decode(self, reader: BitReader, n: int) -> np.ndarray:
        widths = reader.unary(n)
        if self.code == "delta":
            widths = _read(reader, widths) - 1
        return _read(reader, widths) - 1


def _log2(values: np.ndarray) -> np.ndarray:
    """Returns ⌊log₂⌋ of integers from 1, exact up to 2⁵³."""
    return (values.astype(np.float64).view(np.int64) >> 52) - 1023


def _read(reader: BitReader, widths: np.ndarray) -> np.ndarray:
    """Reads numbers of `widths` + 1 bits, of which the leading one is not sent."""
    if widths.max(initial=0) > 32:
        raise ValueError("an integer has more than 33 bits")
    values: np.ndarray = reader.planes(len(widths), widths) | np.int64(1) << widths
    return values
