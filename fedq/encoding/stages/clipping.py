"""Clipping scales down, clamps or zeroes large tensors or elements, at a fixed or an adaptive limit."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.adaptive import StateUpdate
from fedq.encoding.numerics import exact_divide, largest_magnitude, sums, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.errors import check_choice, check_range
from fedq.keys import Key

By = Literal["norm", "value"]
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Clip(EncodingStage):
    """The base class of stages with a fixed limit.

    Takes and gives a floating tensor of any shape. Decoding changes nothing.

    limit: from 1.2e-38 to 3.4e38, float32's normal numbers.
    """

    limit: float

    def __post_init__(self) -> None:
        check_range("limit", self.limit, _FLOAT32.tiny, _FLOAT32.max)

    @override
    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        working_dtype(self, spec)
        return {}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return y.clone()


@dataclass(frozen=True)
class ClipByValue(Clip):
    """Clamps each element to ±limit (see Clip)."""

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        return _clip_by_value(x, self.limit), {}


@dataclass(frozen=True)
class ClipByNorm(Clip):
    """Scales a tensor down to ‖x‖₂ = limit if its norm is larger (see Clip)."""

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        return _clip_by_norm(x, self.limit)[0], {}


@dataclass(frozen=True)
class QuantileStage(AdaptiveEncodingStage):
    """The base class of adaptive limits, which estimate a quantile of the clients' sizes (Andrew 2021, §2).

    Each client reports one byte: whether its size is at most the estimate C. If the share of such clients in a cohort
    is b, the next estimate is C · exp(−rate · (b − quantile)). So C moves to the quantile. Each tensor has its own
    estimate; `joint` encoding has one estimate for the whole model.

    initial: the first estimate, from 1.2e-38 to 3.4e38.
    quantile: from 0 to 1.
    rate: above 0, at most 100.
    """

    initial: float
    quantile: float
    rate: float

    def __post_init__(self) -> None:
        check_range("initial", self.initial, _FLOAT32.tiny, _FLOAT32.max)
        check_range("rate", self.rate, above=0, high=100)
        check_range("quantile", self.quantile, 0, 1)

    @override
    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        working_dtype(self, spec)
        return {}

    def initial_state(self, spec: TensorSpec) -> Tensors:
        """The first estimate."""
        return {"estimate": torch.tensor(self.initial, dtype=torch.float32)}

    def params(self, state: Tensors) -> Tensors:
        """The estimate."""
        return {"estimate": state["estimate"].clone()}

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """Whether the client's size is at most the estimate."""
        return {"within": StateUpdate(TensorSpec((), torch.bool), "stack")}

    @override
    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        share = float(aggregated["within"].double().mean())
        estimate = float(state["estimate"]) * math.exp(-self.rate * (share - self.quantile))
        # an estimate of 0 or infinity would never change
        return {"estimate": torch.tensor(min(max(estimate, _FLOAT32.tiny), _FLOAT32.max), dtype=torch.float32)}

    @override
    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        y, within = self._limit(x, float(params["estimate"]))
        return y, {}, {"within": torch.tensor(within)}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        return y.clone()

    @abstractmethod
    def _limit(self, x: Tensor, estimate: float) -> tuple[Tensor, bool]:
        """Returns the tensor to send, and whether the size of `x` is at most the estimate."""


@dataclass(frozen=True)
class AdaptiveQuantileClip(QuantileStage):
    """Clips at an estimate of a quantile of the clients' norms (Andrew 2021), without the paper's noise.

    initial, quantile, rate: see QuantileStage.
    by: "norm" scales x down to the quantile of norms; "value" clamps each element to the quantile of largest
        magnitudes.
    """

    initial: float = 1.0
    quantile: float = 0.8
    rate: float = 0.2
    by: By = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("by", self.by, By)

    def _limit(self, x: Tensor, estimate: float) -> tuple[Tensor, bool]:
        if self.by == "norm":
            return _clip_by_norm(x, estimate)
        return _clip_by_value(x, estimate), largest_magnitude(x) <= estimate


@dataclass(frozen=True)
class ZeroOutliers(QuantileStage):
    """Sends zeros for a tensor, if its largest magnitude is above multiplier · C + increment.

    C is the estimate of a quantile of the clients' largest magnitudes. The defaults equal the defaults of TensorFlow
    Federated's zeroing_factory. C soon moves a little above the largest magnitude.

    initial, quantile, rate: see QuantileStage.
    multiplier: from 1.2e-38 to 3.4e38.
    increment: 0 or more.
    """

    initial: float = 10.0
    quantile: float = 0.98
    rate: float = math.log(10)
    multiplier: float = 2.0
    increment: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("multiplier", self.multiplier, _FLOAT32.tiny, _FLOAT32.max)
        check_range("increment", self.increment, 0)

    def _limit(self, x: Tensor, estimate: float) -> tuple[Tensor, bool]:
        largest = largest_magnitude(x)
        return torch.zeros_like(x) if largest > self.multiplier * estimate + self.increment else x, largest <= estimate


def _clip_by_value(x: Tensor, limit: float) -> Tensor:
    """Returns `x` clamped to ±limit."""
    limit = min(limit, torch.finfo(x.dtype).max)
    return x.clamp(-limit, limit)


def _clip_by_norm(x: Tensor, limit: float) -> tuple[Tensor, bool]:
    """Returns `x` scaled down to ‖x‖₂ ≤ limit, and whether its norm was at most the limit."""
    largest = largest_magnitude(x)
    # ‖x‖ / max |x| is from 1 to √n: it never overflows
    ratio = math.sqrt(sums(x, lambda part: exact_divide(part, largest).square())[0]) if largest else 0.0
    if largest * ratio <= limit:
        return x, True
    unit = exact_divide(x.to(torch.promote_types(x.dtype, torch.float32)), largest)
    return unit.mul_(limit / ratio).to(x.dtype), False
