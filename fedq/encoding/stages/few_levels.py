"""A few levels and a scale: three, some evenly spaced, or the powers of two."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.numerics import (
    blocks,
    check_block,
    check_scale,
    chunks,
    exact_divide,
    largest_magnitude,
    sums,
    working_dtype,
)
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up, look_up_scaled
from fedq.keys import Key


class _Ternary(EncodingStage):
    """Symbols 0, 1, 2 of the same shape for −m, 0, m."""

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The magnitude m: float64 for a float64 tensor, else float32."""
        return {"scale": TensorSpec((), working_dtype(self, spec))}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["scale"], spec)
        return TensorSpec.symbols(spec.shape, 3)

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        return look_up(y, torch.stack((-side["scale"], torch.zeros_like(side["scale"]), side["scale"])), spec)


@dataclass(frozen=True)
class TernGrad(_Ternary):
    """Sends −m, 0 or m, m = max |x|: an element is not 0 with probability |x| / m (Wen 2017).

    Takes a floating tensor of any shape; gives symbols 0, 1, 2 of the same shape, and m as a side value. Unbiased;
    the squared error is m ‖x‖₁ − ‖x‖².

    clip: elements are first clipped to so many root mean squares (2.5 in the paper), which lowers m; then biased.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be above 0, not {self.clip}")

    @property
    def unbiased(self) -> bool:
        """True without clipping."""
        return self.clip is None

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        work, scale = working_dtype(self, TensorSpec.of(x)), largest_magnitude(x)
        if self.clip is not None and scale:
            (total,) = sums(x, lambda part: exact_divide(part, scale).square_())
            scale *= min(1.0, self.clip * math.sqrt(total / x.numel()))
        side = {"scale": torch.tensor(scale, dtype=work)}
        symbols, bits = torch.ones(x.shape, dtype=torch.uint8, device=x.device), key.bit_generator()
        if not side["scale"]:
            return symbols, side
        for given, out in chunks(x, symbols):
            part = exact_divide(given.to(work), float(side["scale"])).clamp_(-1, 1)
            out.copy_(_round_up(part.abs(), bits).clamp_(max=1).copysign_(part).add_(1))
        return symbols, side


@dataclass(frozen=True)
class ThreeLevel(_Ternary):
    """Rounds to −m, 0 or m, m = sparsity · max |x| (3LC, Lim 2019).

    Takes a floating tensor of any shape; gives symbols 0, 1, 2 of the same shape, and m as a side value. No element
    is off by more than m/2. Biased: the paper adds the error to the next round's tensor.

    sparsity: from 1 to below 2; what is below half of that of the largest magnitude becomes 0.
    """

    sparsity: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.sparsity < 2:
            raise ValueError(f"sparsity must be from 1 to below 2, not {self.sparsity}")

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        work = working_dtype(self, TensorSpec.of(x))
        scale = torch.tensor(min(self.sparsity * largest_magnitude(x), torch.finfo(x.dtype).max), dtype=work)
        half, symbols = float(scale) / 2, torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for given, out in chunks(x, symbols):
            part = given.to(work)
            torch.add((part > half).view(torch.uint8), part >= -half, out=out)
        return symbols, {"scale": scale}


@dataclass(frozen=True)
class QSGD(EncodingStage):
    """Rounds each element, up or down at random, to a multiple of 1/levels of its bucket's norm (Alistarh 2017).

    Takes a floating tensor of any shape; gives symbols 0 … 2 · levels of the same shape, `levels` standing for 0, and
    a norm for each `bucket` consecutive elements as a side value. Unbiased; the squared error of a bucket of d
    elements is at most min(d / levels², √d / levels) ‖x‖² with the l2 norm, and d / (4 levels²) max² with "max".

    levels: 1 to 32,767. bucket: 1 to 16,384. norm: "l2" or "max".
    """

    unbiased = True

    levels: int = 4
    bucket: int = 512
    norm: Literal["l2", "max"] = "l2"

    def __post_init__(self) -> None:
        if not 1 <= self.levels < 1 << 15:
            raise ValueError(f"levels must be from 1 to 32767, not {self.levels}")
        check_block("bucket", self.bucket)
        if self.norm not in ("l2", "max"):
            raise ValueError(f"norm must be l2 or max, not {self.norm!r}")

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """A norm for each bucket: float64 for a float64 tensor, else float32."""
        return {"norms": TensorSpec((-(-spec.numel // self.bucket),), working_dtype(self, spec))}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["norms"], spec)
        return TensorSpec.symbols(spec.shape, 2 * self.levels + 1)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        spec, bits, start = TensorSpec.of(x), key.bit_generator(), 0
        norms = [torch.zeros(0, dtype=working_dtype(self, spec), device=x.device)]
        symbols = torch.empty(x.shape, dtype=TensorSpec.symbols((), 2 * self.levels + 1).dtype, device=x.device)
        out = symbols.view(-1)
        for rows in blocks(x, self.bucket):
            norm = rows.abs().amax(1, keepdim=True)
            if self.norm == "l2":
                # The scheme is right for every norm from the maximum up, hence for what the dtype can hold.
                unit = norm.masked_fill(norm == 0, 1).double()
                l2 = rows.div(unit).square_().sum(1, keepdim=True).sqrt_().mul_(unit)
                norm = l2.clamp_(max=torch.finfo(x.dtype).max).to(norm.dtype).maximum(norm)
            norms.append(norm.view(-1))
            part = rows.div(norm.masked_fill(norm == 0, 1)).mul_(self.levels)
            rounded = _round_up(part.abs(), bits).clamp_(max=self.levels).copysign_(part).add_(self.levels).view(-1)
            out[start : start + rows.numel()] = rounded[: len(out) - start]
            start += rows.numel()
        return symbols, {"norms": torch.cat(norms).cpu()}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        levels = torch.arange(-self.levels, self.levels + 1, dtype=torch.float64) / self.levels
        return look_up_scaled(y, levels, side["norms"], self.bucket, spec)


@dataclass(frozen=True)
class NaturalCompression(EncodingStage):
    """Rounds to a power of two, up or down at random: keeps sign and exponent only (Horváth 2019).

    Takes a floating tensor of any shape; gives symbols of sign and exponent of the same shape: 9 bits for float32 and
    bfloat16, 6 for float16, 12 for float64. Random bits are added to the mantissa, and what carries over into the
    exponent is kept. Unbiased; the squared error is at most ‖x‖² / 8. Denormals become 0 or the smallest normal number,
    what is beyond the largest power of two becomes that or the dtype's largest number.
    """

    unbiased = True

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """None."""
        working_dtype(self, spec)
        return {}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        return TensorSpec.symbols(spec.shape, 2 << _FORMATS[spec.dtype][0])

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        exponent, mantissa, integer = _FORMATS[x.dtype]
        symbols = torch.empty(x.shape, dtype=TensorSpec.symbols((), 2 << exponent).dtype, device=x.device)
        bits = key.bit_generator()
        for part, out in chunks(x, symbols):
            random = _random(bits, len(part), integer, x.device).bitwise_and_((1 << mantissa) - 1)
            out.copy_(random.add_(part.view(integer)).bitwise_right_shift_(mantissa).bitwise_and_((2 << exponent) - 1))
        return symbols, {}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        exponent, mantissa, integer = _FORMATS[spec.dtype]
        powers = (torch.arange(1 << exponent) << mantissa).to(integer).view(spec.dtype).double()
        return look_up(y, torch.cat((powers, -powers)), spec)


_FORMATS = {
    torch.float16: (5, 10, torch.int16),
    torch.bfloat16: (8, 7, torch.int16),
    torch.float32: (8, 23, torch.int32),
    torch.float64: (11, 52, torch.int64),
}
"""Bits of exponent and of mantissa, and the integer of the same size."""


def _random(bits: np.random.SFC64, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns n integers of random bits."""
    size = dtype.itemsize
    words = bits.random_raw(-(-n * size // 8)).view(f"<i{size}")[:n]
    return torch.from_numpy(words).to(device)


def _round_up(x: Tensor, bits: np.random.SFC64) -> Tensor:
    """Rounds `x` ≥ 0 in place: up with a probability equal to the fraction (to 2⁻²⁴), else down. 0 stays 0."""
    random = _random(bits, x.numel(), torch.int32, x.device).bitwise_right_shift_(8).view(x.shape)
    return x.add_(random, alpha=2**-24).add_(0.5).floor_()
