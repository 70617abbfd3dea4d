"""Elias's universal codes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from fedq.encoding.coders.bit_stream import BitReader, from_natural, planes, read, to_natural, unary, write
from fedq.encoding.coders.coder import Coder
from fedq.encoding.schema import TensorSpec


@dataclass(frozen=True)
class Elias(Coder):
    """Elias's gamma or delta code (1975): good for any falling probabilities, and nothing is sent beside the bits.

    x from 1 takes 2⌊log₂ x⌋ + 1 bits in gamma; in delta ⌊log₂ x⌋ + 2⌊log₂(⌊log₂ x⌋ + 1)⌋ + 1, fewer from x = 32 on.
    Symbols are coded as x − 1; where there are no levels they are any integers of 32 bits, negative ones as 2·|v| − 1.

    code: "gamma" or "delta".
    """

    code: Literal["gamma", "delta"] = "gamma"

    def __post_init__(self) -> None:
        if self.code not in ("gamma", "delta"):
            raise ValueError(f"code must be gamma or delta, not {self.code!r}")

    def encode(self, symbols: Tensor, spec: TensorSpec) -> bytes:
        """As Coder.encode. Raises ValueError for a symbol out of range."""
        return write(to_natural(symbols, spec), self._code)

    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """As Coder.decode."""
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
    """Reads what stands behind the leading one of numbers of `widths` + 1 bits."""
    if widths.max(initial=0) > 32:
        raise ValueError("an integer has more than 33 bits")
    values: np.ndarray = reader.planes(len(widths), widths) | np.int64(1) << widths
    return values
