"""QSGD rounds elements to multiples of a fraction of a norm."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import LARGEST_BLOCK, blocks, check_scale, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up_scaled
from fedq.encoding.stages.random_numbers import stochastic_round_
from fedq.errors import check_choice, check_range
from fedq.keys import Key

Norm = Literal["l2", "max"]


@dataclass(frozen=True)
class QSGD(EncodingStage):
    """Rounds each element, up or down at random, to a multiple of 1/levels of its bucket's norm (Alistarh 2017).

    Takes a floating tensor of any shape. Gives symbols 0 … 2 · levels of the same shape; the symbol `levels` means 0.
    Side values are a norm for each bucket. Unbiased. The squared error of a bucket of d elements is at most min(d /
    levels², √d / levels) ‖x‖² with the l2 norm, and d / (4 levels²) max² with "max".

    levels: number of positive multiples, 1 to 32,767.
    bucket: consecutive elements with one norm, 1 to 16,384.
    norm: "l2" or "max".
    """

    unbiased = True

    levels: int = 4
    bucket: int = 512
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        check_range("levels", self.levels, 1, 32_767, integer=True)
        check_range("bucket", self.bucket, 1, LARGEST_BLOCK, integer=True)
        check_choice("norm", self.norm, Norm)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """A norm for each bucket: float64 for a float64 tensor, else float32."""
        return {"norms": TensorSpec((-(-spec.numel // self.bucket),), working_dtype(self, spec))}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["norms"], spec)
        return TensorSpec.symbols(spec.shape, 2 * self.levels + 1)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        spec, bits = TensorSpec.of(x), key.bit_generator()
        norms = [torch.zeros(0, dtype=working_dtype(self, spec), device=x.device)]
        symbols = torch.empty(x.shape, dtype=TensorSpec.symbols((), 2 * self.levels + 1).dtype, device=x.device)
        for rows, out in blocks(x, self.bucket, symbols):
            norm = rows.abs().amax(1, keepdim=True)
            if self.norm == "l2":
                # Any number from the maximum up is a valid norm, so a norm may be clamped to the dtype's range.
                unit = norm.masked_fill(norm == 0, 1).double()
                l2 = rows.div(unit).square_().sum(1, keepdim=True).sqrt_().mul_(unit)
                norm = l2.clamp_(max=torch.finfo(x.dtype).max).to(norm.dtype).maximum(norm)
            norms.append(norm.view(-1))
            part = rows.div(norm.masked_fill(norm == 0, 1)).mul_(self.levels)
            rounded = (
                stochastic_round_(part.abs(), bits).clamp_(max=self.levels).copysign_(part).add_(self.levels).view(-1)
            )
            out.copy_(rounded[: len(out)])
        return symbols, {"norms": torch.cat(norms).cpu()}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        levels = torch.arange(-self.levels, self.levels + 1, dtype=torch.float64) / self.levels
        return look_up_scaled(y, levels, side["norms"], self.bucket, spec)
