"""Three levels: −m, 0 and m."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import check_scale, chunks, exact_divide, largest_magnitude, sums, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up
from fedq.encoding.stages.random_numbers import stochastic_round_
from fedq.errors import check_range
from fedq.keys import Key


class _Ternary(EncodingStage):
    """The base class of stages with symbols 0, 1, 2 of the same shape for −m, 0, m."""

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The magnitude m: float64 for a float64 tensor, else float32."""
        return {"scale": TensorSpec((), working_dtype(self, spec))}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["scale"], spec)
        return TensorSpec.symbols(spec.shape, 3)

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return look_up(y, torch.stack((-side["scale"], torch.zeros_like(side["scale"]), side["scale"])), spec)


@dataclass(frozen=True)
class TernGrad(_Ternary):
    """Sends −m, 0 or m with m = max |x|: ±m with probability |x| / m (Wen 2017).

    Takes a floating tensor of any shape; gives symbols 0, 1, 2 of the same shape, and m as a side value. Unbiased;
    the squared error is m ‖x‖₁ − ‖x‖².

    clip: limit, in root mean squares, at which elements are first clipped, or None. The paper has 2.5. Clipping
        lowers m, and makes the stage biased.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        check_range("clip", self.clip, above=0, optional=True)

    @property
    def unbiased(self) -> bool:
        """True without clipping."""
        return self.clip is None

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
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
            out.copy_(stochastic_round_(part.abs(), bits).clamp_(max=1).copysign_(part).add_(1))
        return symbols, side


@dataclass(frozen=True)
class ThreeLevel(_Ternary):
    """Rounds to −m, 0 or m with m = sparsity · max |x| (3LC, Lim 2019).

    Takes a floating tensor of any shape; gives symbols 0, 1, 2 of the same shape, and m as a side value. No error is
    above m/2. Biased: the paper adds the error to the next round's tensor.

    sparsity: at least 1, below 2. Elements below sparsity / 2 of the largest magnitude become 0.
    """

    sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_range("sparsity", self.sparsity, 1, below=2)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        work = working_dtype(self, TensorSpec.of(x))
        scale = torch.tensor(min(self.sparsity * largest_magnitude(x), torch.finfo(x.dtype).max), dtype=work)
        half, symbols = float(scale) / 2, torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for given, out in chunks(x, symbols):
            part = given.to(work)
            torch.add((part > half).view(torch.uint8), part >= -half, out=out)
        return symbols, {"scale": scale}
