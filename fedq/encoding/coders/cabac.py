"""Context-adaptive binary arithmetic coding (Marpe 2003), of networks as in DeepCABAC (Wiedemann 2019).

A matrix is coded row by row. Earlier symbols predict the magnitude of a symbol: the mean magnitude of its column, times
the mean of its row, divided by the mean of all. The prediction falls into one of 64 classes, two an octave. Each class
has its own probabilities, which follow the symbols. No table and no scales are sent.

Format: 16-bit words, little-endian, of one number in the final interval of the symbols, without zeros at its end. A
row of 128 symbols or more begins with a flag: whether it holds a symbol other than 0. A row without such a symbol is
skipped. A symbol is sent as binary decisions:
- whether its magnitude is above 0, 1, 2, … in units of 2^k, up to 16;
- the rest above 16 units, in the exponential Golomb code;
- k low bits, where k grows with the class, and the sign; both count as random.
A symbol of 0 … levels − 1 counts from the middle one. A tensor without elements, or of zeros only, has no bytes.

The table gives million symbols a second, to encode and to decode, in one thread of a shared core. The input is 512 ×
3136 symbols (int32) from a rounded normal law. There is one law for all, or scales of rows and columns are drawn from
exp(0.7 · normal).

    bits a symbol           one law     with scales
    0.1                    133   137      155   168
    0.4                    118   130      112   127
    1.0                     86    97       75    86
    a matrix of zeros     8000 and more

For a million symbols of one geometric or normal law, the bytes are within 1 % of the entropy from 0.3 bits a symbol on.
Below 0.3 bits, they are up to 0.002 bits a symbol longer, because probabilities never stop moving. Above mean
magnitudes of 2^17 the bytes grow longer, because no class is for larger means.

Both sides compute the same classes and probabilities on every machine: with integers, and with float64 operations (+,
×, ÷) that no compiler may reorder.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.coder import Buffer, Coder, checked, limits
from fedq.encoding.schema import TensorSpec


@dataclass(frozen=True)
class CABAC(Coder):
    """Context-adaptive binary arithmetic coding (Marpe 2003) by the scales of rows and columns, for integers.

    Takes symbols with or without levels, in any integer dtype, as the matrix of TensorSpec.matrix. Best for
    few bits a symbol, and for matrices whose rows and columns differ in scale or are zero.

    signed: False sends no signs, for symbols that are all 0 or more. True sends a sign after each 1, also for symbols
        of two levels. Pass False for masks, which need no signs.
    """

    signed: bool = True

    @override
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        from fedq.encoding.coders.cabac_loops import cabac_encode

        if not spec.numel:
            return b""
        values = checked(symbols, *limits(spec)).astype(np.int32, copy=False)
        if not self.signed and int(values.min()) < 0:
            raise ValueError("a symbol is below 0, and signed is False")
        matrix = values.reshape(spec.matrix)
        words: np.ndarray = cabac_encode(matrix, self._centre(spec), self.signed)
        return words.astype("<u2", copy=False).tobytes()

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        from fedq.encoding.coders.cabac_loops import cabac_decode

        if len(data) % 2:
            raise ValueError(f"{len(data)} bytes are not words of 16 bits")
        words = np.frombuffer(data, "<u2").astype(np.uint16, copy=False)
        centre = self._centre(spec)
        values = np.full(spec.matrix, centre, np.int32) if centre else np.zeros(spec.matrix, np.int32)
        if not cabac_decode(words, centre, self.signed, *limits(spec), values):
            raise ValueError("the words do not end with the last symbol")
        return torch.from_numpy(values).to(spec.dtype).reshape(spec.shape)

    def _centre(self, spec: TensorSpec) -> int:
        return limits(spec)[1] // 2 if spec.levels and self.signed else 0
