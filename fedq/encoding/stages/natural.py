"""Natural compression: powers of two."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import chunks, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up
from fedq.encoding.stages.random_numbers import random_integers
from fedq.keys import Key

_FORMATS = {
    torch.float16: (5, 10, torch.int16),
    torch.bfloat16: (8, 7, torch.int16),
    torch.float32: (8, 23, torch.int32),
    torch.float64: (11, 52, torch.int64),
}
"""Bits of exponent and of mantissa, and the integer of the same size."""


@dataclass(frozen=True)
class NaturalCompression(EncodingStage):
    """Rounds to a power of two, up or down at random: only sign and exponent are sent (Horváth 2019).

    Takes a floating tensor of any shape; gives symbols of sign and exponent, of the same shape. A symbol has 9 bits for
    float32 and bfloat16, 6 for float16, 12 for float64. Random bits are added to the mantissa; a carry raises the
    exponent. Unbiased; the squared error is at most ‖x‖² / 8. Denormals become 0 or the smallest normal number.
    Elements beyond the largest power of two become that power or the dtype's largest number.
    """

    unbiased = True

    @override
    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        working_dtype(self, spec)
        return {}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        return TensorSpec.symbols(spec.shape, 2 << _FORMATS[spec.dtype][0])

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        exponent, mantissa, integer = _FORMATS[x.dtype]
        symbols = torch.empty(x.shape, dtype=TensorSpec.symbols((), 2 << exponent).dtype, device=x.device)
        bits = key.bit_generator()
        for part, out in chunks(x, symbols):
            random = random_integers(bits, part, integer).bitwise_and_((1 << mantissa) - 1)
            out.copy_(random.add_(part.view(integer)).bitwise_right_shift_(mantissa).bitwise_and_((2 << exponent) - 1))
        return symbols, {}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        exponent, mantissa, integer = _FORMATS[spec.dtype]
        powers = (torch.arange(1 << exponent) << mantissa).to(integer).view(spec.dtype).double()
        return look_up(y, torch.cat((powers, -powers)), spec)
