"""DRIVE and EDEN: a few bits an element, after a random rotation."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import LARGEST_BLOCK, blocks, check_scale, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up_scaled, nearest, normal_levels
from fedq.errors import check_choice, check_range
from fedq.keys import Key

Scale = Literal["unbiased", "least_squares"]


@dataclass(frozen=True)
class Eden(EncodingStage):
    """Rounds a randomly rotated tensor to the best levels for a normal distribution (EDEN, Vargaftik 2022).

    Takes a floating tensor of any shape. Gives symbols 0 … 2^bits − 1 of the same shape. Side values are a scale for
    each block. A block z is divided by its root mean square and rounded to the nearest levels, Q. The decoder returns S
    · Q. The side value is S times the largest level. The stage alone is biased. For less than one bit an element, put
    RandomMask between the rotation and this stage.

    bits: 1 to 8.
    block: consecutive elements with one scale, 1 to 16,384: the rotation's block or a divisor of it.
    scale: "unbiased": S = ‖z‖² / ⟨z, Q⟩. After a uniformly random rotation for each client (shared: false), the decoded
        tensor is x on average. The mean over n clients has 1/n of one client's squared error. In high dimensions one
        client's error is 1/(1 − D) − 1 of ‖x‖², where D is the squared error of LloydMax. This is π/2 − 1 at 1 bit
        (DRIVE, Vargaftik 2021), and 0.133, 0.0358 and 0.0096 at 2, 3 and 4 bits. "least_squares": S = ⟨z, Q⟩ / ‖Q‖²,
        with the smallest squared error, D: 1 − 2/π at 1 bit.
    """

    bits: int = 1
    block: int = 1024
    scale: Scale = "unbiased"

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8, integer=True)
        check_range("block", self.block, 1, LARGEST_BLOCK, integer=True)
        check_choice("scale", self.scale, Scale)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """A scale for each block: float64 for a float64 tensor, else float32."""
        return {"scales": TensorSpec((-(-spec.numel // self.block),), working_dtype(self, spec))}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["scales"], spec)
        return TensorSpec.symbols(spec.shape, 1 << self.bits)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        levels = _levels(self.bits)
        scales = [torch.zeros(0, dtype=torch.float64, device=x.device)]
        symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for rows, out in blocks(x, self.block, symbols):
            # in units of each block's largest magnitude, so that no square overflows, and not all squares underflow
            unit = rows.abs().amax(1, keepdim=True)
            z = rows.div(unit.masked_fill(unit == 0, 1))
            square = z.square().sum(1).double()
            length = torch.full_like(square, self.block)
            length[-1] = len(out) - (len(rows) - 1) * self.block
            if self.bits == 1:  # the levels are −1 and 1: ⟨z, Q⟩ is the sum of magnitudes
                # numpy compares seven times as fast as torch
                out.copy_(torch.from_numpy(rows.view(-1)[: len(out)].cpu().numpy() > 0))
                dot, levels_square = z.abs_().sum(1).double(), length
            else:
                rms = square.div(length).sqrt_()
                top = rms.masked_fill(rms == 0, 1).mul_(normal_levels(self.bits)[-1].item())
                out.copy_(nearest(z.div(top[:, None].to(z.dtype)).view(-1), levels)[: len(out)])
                q = torch.zeros_like(z)
                q.view(-1)[: len(out)] = levels.to(z).index_select(0, out.int())
                dot, levels_square = (z * q).sum(1).double(), q.square_().sum(1).double()
            scale = square / dot if self.scale == "unbiased" else dot / levels_square
            scales.append(scale.masked_fill_(dot == 0, 0).mul_(unit.view(-1).double()))
        limit = torch.finfo(x.dtype).max
        return symbols, {"scales": torch.cat(scales).clamp_(max=limit).to("cpu", working_dtype(self, TensorSpec.of(x)))}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return look_up_scaled(y, _levels(self.bits), side["scales"], self.block, spec)


def _levels(bits: int) -> Tensor:
    """Returns the levels divided by the largest level, so that no scale exceeds its elements."""
    return normal_levels(bits) / normal_levels(bits)[-1]
