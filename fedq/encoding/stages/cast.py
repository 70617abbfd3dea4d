"""Casts to a shorter floating dtype."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import chunks, is_finite, largest_magnitude, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.errors import check_choice
from fedq.keys import Key

ShortDtype = Literal["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
_DTYPES = {name: getattr(torch, name) for name in get_args(ShortDtype)}


@dataclass(frozen=True)
class Cast(EncodingStage):
    """Rounds every element to the nearest value of a shorter dtype, ties to even.

    Takes a floating tensor of any shape; gives a tensor of the same shape. float16 (IEEE 754-2008) and bfloat16 stay
    floating. float8_e4m3fn and float8_e5m2 (Micikevicius 2022) become symbols 0 … 255, their bits: every coder takes
    symbols. A value beyond the dtype's largest finite value becomes the largest, never infinity. Small values become
    denormals of the dtype. If the result is a normal number, the relative error is at most 2^-11, 2^-8, 2^-4 and 2^-3,
    in the order of these dtypes. float64 is first rounded to float32, so a value within 2^-24 of a tie may go to the
    wrong side.

    dtype: float16, bfloat16, float8_e4m3fn or float8_e5m2.
    scale: True first multiplies the tensor by a power of two that puts the largest magnitude into the dtype's highest
        octave. No element is then clipped, and float8 uses its whole range. The exponent is a side value of two bytes.
    """

    dtype: ShortDtype = "float16"
    scale: bool = False

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ShortDtype)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The exponent of the scale (int16), with `scale`."""
        working_dtype(self, spec)
        return {"exponent": TensorSpec((), torch.int16)} if self.scale else {}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The shorter dtype, or symbols of 256 levels."""
        if self.scale and not -1024 <= int(side["exponent"]) <= 1203:
            raise ValueError(f"the exponent of a scale is {int(side['exponent'])}")
        dtype = _DTYPES[self.dtype]
        return TensorSpec.symbols(spec.shape, 256) if dtype.itemsize == 1 else TensorSpec(spec.shape, dtype)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        dtype, exponent, side = _DTYPES[self.dtype], 0, {}
        largest = torch.finfo(dtype).max
        if self.scale:
            peak = largest_magnitude(x)
            # x = m · 2^e with m in [½, 1): subtract exponents, and 1 more if m is above the dtype's largest m
            (fraction, own), (top_fraction, top) = math.frexp(peak), math.frexp(largest)
            exponent = top - own - (fraction > top_fraction) if peak else 0
            side = {"exponent": torch.tensor(exponent, dtype=torch.int16)}
        spec = TensorSpec.of(x)
        work, symbols = working_dtype(self, spec), self.encoded_spec(spec, side)
        y = torch.empty(x.shape, dtype=symbols.dtype, device=x.device)
        for part, out in chunks(x, y.view(dtype)):
            out.copy_(_times_power(part.to(work), exponent).clamp(-largest, largest).float())
        return y, side

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """Raises ValueError for codes of NaN and infinity."""
        work, dtype, largest = working_dtype(self, spec), _DTYPES[self.dtype], torch.finfo(spec.dtype).max
        exponent = int(side["exponent"]) if self.scale else 0
        decoded = torch.empty(spec.shape, dtype=spec.dtype, device=y.device)
        # a table for float8: torch's own conversion to float32 takes several times longer
        table = torch.arange(256, device=y.device).to(torch.uint8).view(dtype).to(work) if dtype.itemsize == 1 else None
        for part, out in chunks(y, decoded):
            value = part.to(work) if table is None else table.index_select(0, part.int())
            if not is_finite(value):
                raise ValueError("a code means NaN or infinity")
            out.copy_(_times_power(value, -exponent).clamp_(-largest, largest))
        return decoded


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """Returns x · 2^exponent, in several steps, because the power may overflow or underflow the dtype."""
    while exponent:
        part = max(-120, min(120, exponent))
        x, exponent = x * 2.0**part, exponent - part
    return x
