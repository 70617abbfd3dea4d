"""Context-adaptive binary arithmetic coding (Marpe 2003), of networks as in DeepCABAC (Wiedemann 2019).

A matrix is coded row by row. What a symbol's magnitude may be is told by the mean magnitudes so far of its column and
of its row, over that of all: the product is one of 64 classes, two an octave, and each has probabilities of its own
that follow the symbols. Nothing else travels: no table, no scales.

Format: 16-bit words, little-endian, of one number in the interval that the symbols lead to, zeros at its end left out.
A row of 128 symbols or more begins with whether it holds any but 0; one that does not is left out of all that follows.
A symbol is, as binary decisions: whether its magnitude is above 0, 1, 2, … in units of 2^k, up to 16; what is beyond in
the exponential Golomb code; k low bits, where k is larger the larger the class; the sign. The last two are taken for
random. A symbol of 0 … levels − 1 counts from the middle one. A tensor without elements, or all 0, has no bytes.

Measured on 512 × 3136 symbols (int32) from a rounded normal law, one for all or with rows' and columns' scales drawn
from exp(0.7 · normal), in one thread of a shared core (M symbols/s to encode, to decode):

    bits a symbol           one law     with scales
    0.1                    133   137      155   168
    0.4                    118   130      112   127
    1.0                     86    97       75    86
    a matrix of zeros     8000 and more

Of a million symbols of one geometric or normal law the bytes are within 1 % of the entropy from 0.3 bits a symbol on;
below that they are up to 0.002 bits a symbol longer, as probabilities never stop moving. Above mean magnitudes of 2^17
they grow longer: there are no classes for those.

All that classes and probabilities follow from is computed alike by both sides, on every machine: in integers, and by
additions, multiplications and divisions of float64 that no compiler may change.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.coders import tokens as shared
from fedq.encoding.coders.coder import Buffer, Coder, checked, limits
from fedq.encoding.schema import TensorSpec

_KERNELS = "coders._cabac_kernels"


@dataclass(frozen=True)
class CABAC(Coder):
    """Context-adaptive binary arithmetic coding (Marpe 2003) by the scales of rows and columns, for integers.

    Takes symbols of any number of levels, or none, in any integer dtype; of what axes the rows are, see
    TensorSpec.matrix. For matrices whose rows and columns differ in scale, or are dead, and for few bits a symbol.

    signed: False for symbols that are all 0 or more, and count from 0: none has a sign then.
    """

    signed: bool = True

    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        """As Coder.encode."""
        if not spec.numel:
            return b""
        values = checked(symbols, *limits(spec)).astype(np.int32, copy=False)
        if not self.signed and int(values.min()) < 0:
            raise ValueError("a symbol is below 0, and signed is False")
        matrix = values.reshape(spec.matrix)
        words: np.ndarray = shared.kernels(_KERNELS).cabac_encode(matrix, self._centre(spec), self.signed)
        return words.astype("<u2", copy=False).tobytes()

    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """As Coder.decode."""
        if len(data) % 2:
            raise ValueError(f"{len(data)} bytes are not words of 16 bits")
        words = np.frombuffer(data, "<u2").astype(np.uint16, copy=False)
        centre = self._centre(spec)
        values = np.full(spec.matrix, centre, np.int32) if centre else np.zeros(spec.matrix, np.int32)
        if not shared.kernels(_KERNELS).cabac_decode(words, centre, self.signed, *limits(spec), values):
            raise ValueError("the words do not end as the symbols do")
        return torch.from_numpy(values).to(spec.dtype).reshape(spec.shape)

    def _centre(self, spec: TensorSpec) -> int:
        return limits(spec)[1] // 2 if spec.levels and self.signed else 0
