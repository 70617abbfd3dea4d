"""DRIVE and EDEN: a few bits an element behind a random rotation."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedq.encoding.numerics import blocks, check_block, check_scale, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up_scaled, nearest, normal_levels
from fedq.keys import Key


@dataclass(frozen=True)
class Eden(EncodingStage):
    """Rounds what a random rotation gives to the best levels for a normal distribution (EDEN, Vargaftik 2022).

    Takes a floating tensor of any shape; gives symbols 0 … 2^bits − 1 of the same shape and a scale for each `block`
    consecutive elements as a side value. A block z is divided by its root mean square and rounded to the nearest
    level, Q. Decoded is S · Q, S times the largest level being what travels, where S is, with scale
    "unbiased": ‖z‖² / ⟨z, Q⟩. Behind a rotation that is uniformly random and each client's own (shared: false), the
        inverse then gives x on average, and the mean over n clients has 1/n of one's squared error, which is
        1/(1 − D) − 1 of ‖x‖² in high dimensions, D being that of LloydMax: π/2 − 1 at 1 bit, which is DRIVE
        (Vargaftik 2021); 0.133, 0.0358, 0.0096 at 2, 3, 4 bits.
    "least_squares": ⟨z, Q⟩ / ‖Q‖², with the least squared error, D: 1 − 2/π at 1 bit.
    The stage alone is biased. For less than one bit an element, put RandomMask between it and the rotation.

    bits: 1 to 8. block: 1 to 16,384, the rotation's or a divisor of it.
    """

    bits: int = 1
    block: int = 1024
    scale: Literal["unbiased", "least_squares"] = "unbiased"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, not {self.bits}")
        check_block("block", self.block)
        if self.scale not in ("unbiased", "least_squares"):
            raise ValueError(f"scale must be unbiased or least_squares, not {self.scale!r}")

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """A scale for each block: float64 for a float64 tensor, else float32."""
        return {"scales": TensorSpec((-(-spec.numel // self.block),), working_dtype(self, spec))}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["scales"], spec)
        return TensorSpec.symbols(spec.shape, 1 << self.bits)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        levels, start = _levels(self.bits), 0
        scales = [torch.zeros(0, dtype=torch.float64, device=x.device)]
        symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        out = symbols.view(-1)
        for rows in blocks(x, self.block):
            real = min(rows.numel(), len(out) - start)
            # in units of each block's largest magnitude: no square overflows, and not all underflow
            unit = rows.abs().amax(1, keepdim=True)
            z = rows.div(unit.masked_fill(unit == 0, 1))
            square = z.square().sum(1).double()
            length = torch.full_like(square, self.block)
            length[-1] = real - (len(rows) - 1) * self.block
            if self.bits == 1:  # the levels are −1 and 1: ⟨z, Q⟩ is the sum of magnitudes
                torch.gt(rows.view(-1)[:real], 0, out=out[start : start + real].view(torch.bool))
                dot, levels_square = z.abs_().sum(1).double(), length
            else:
                rms = square.div(length).sqrt_()
                top = rms.masked_fill(rms == 0, 1).mul_(normal_levels(self.bits)[-1].item())
                chosen = nearest(z.div(top[:, None].to(z.dtype)).view(-1), levels)[:real]
                out[start : start + real] = chosen
                q = torch.zeros_like(z)
                q.view(-1)[:real] = levels.to(z).index_select(0, chosen.int())
                dot, levels_square = (z * q).sum(1).double(), q.square_().sum(1).double()
            scale = square / dot if self.scale == "unbiased" else dot / levels_square
            scales.append(scale.masked_fill_(dot == 0, 0).mul_(unit.view(-1).double()))
            start += real
        limit = torch.finfo(x.dtype).max
        return symbols, {"scales": torch.cat(scales).clamp_(max=limit).to("cpu", working_dtype(self, TensorSpec.of(x)))}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        return look_up_scaled(y, _levels(self.bits), side["scales"], self.block, spec)


def _levels(bits: int) -> Tensor:
    """Returns the levels in units of the largest: their scale is then no larger than what it scales."""
    return normal_levels(bits) / normal_levels(bits)[-1]
