"""One bit an element."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import check_scale, exact_divide, largest_magnitude, sums, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up
from fedq.keys import Key


@dataclass(frozen=True)
class ScaledSign(EncodingStage):
    """Keeps the signs, and the mean magnitude of all elements (EF-signSGD, Karimireddy 2019).

    Takes a floating tensor of any shape. Gives symbols 0 (negative) and 1 (zero or positive) of the same shape. The
    side value is ‖x‖₁ / n. The squared error is ‖x‖² − ‖x‖₁² / n: 1 − 2/π of ‖x‖² for a normal tensor. No other
    magnitude has a smaller error. Biased.
    """

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The mean magnitude: float64 for a float64 tensor, else float32."""
        return {"scale": TensorSpec((), working_dtype(self, spec))}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["scale"], spec)
        return TensorSpec.symbols(spec.shape, 2)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        # in units of the largest magnitude: the sum of a float64 tensor does not overflow
        unit = largest_magnitude(x)
        (total,) = sums(x, lambda part: exact_divide(part, unit).abs_()) if unit else (0.0,)
        scale = torch.tensor(unit * (total / max(x.numel(), 1)), dtype=working_dtype(self, TensorSpec.of(x)))
        return _signs(x), {"scale": scale}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return look_up(y, torch.stack((-side["scale"], side["scale"])), spec)


@dataclass(frozen=True)
class OneBitTwoMeans(EncodingStage):
    """Keeps the signs, the mean of the negative elements and the mean of the others (1-bit SGD, Seide 2014).

    Takes a floating tensor of any shape. Gives symbols 0 (negative) and 1 (zero or positive) of the same shape. Side
    values are the two means. The means are over the whole tensor. The paper has means for each column. The decoded
    tensor has the same sum. The squared error is at most the error of ScaledSign. Biased.
    """

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The magnitudes of the two means (0 without elements): float64 for a float64 tensor, else float32."""
        mean = TensorSpec((), working_dtype(self, spec))
        return {"negative": mean, "positive": mean}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["negative"], spec)
        check_scale(side["positive"], spec)
        return TensorSpec.symbols(spec.shape, 2)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        symbols, unit, dtype = _signs(x), largest_magnitude(x) or 1.0, working_dtype(self, TensorSpec.of(x))
        positives = int(symbols.sum())
        totals = sums(
            x, lambda part: exact_divide(part, -unit).clamp_(min=0), lambda part: exact_divide(part, unit).clamp_(min=0)
        )
        means = [
            unit * (total / max(n, 1)) for total, n in zip(totals, (x.numel() - positives, positives), strict=True)
        ]
        negative, positive = torch.tensor(means, dtype=dtype)
        return symbols, {"negative": negative, "positive": positive}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return look_up(y, torch.stack((-side["negative"], side["positive"])), spec)


def _signs(x: Tensor) -> Tensor:
    # numpy compares seven times as fast as torch
    values = x.reshape(-1).to("cpu", torch.promote_types(x.dtype, torch.float32)).numpy()
    return torch.from_numpy(values >= 0).view(torch.uint8).view(x.shape).to(x.device)
