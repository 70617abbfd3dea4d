"""Clipping: what is too large is cut down or zeroed, at a fixed limit or at one that follows the cohort."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedq.encoding.adaptive import StateUpdate
from fedq.encoding.numerics import exact_divide, largest_magnitude, sums, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.keys import Key

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Clip(EncodingStage):
    """What the fixed limits share. Takes and gives a floating tensor of any shape; nothing is undone.

    limit: positive.
    """

    limit: float

    def __post_init__(self) -> None:
        _check_positive("limit", self.limit)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """None."""
        working_dtype(self, spec)
        return {}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        return y.clone()


@dataclass(frozen=True)
class ClipByValue(Clip):
    """Cuts each element off at ±limit. See Clip."""

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        return _clip_by_value(x, self.limit), {}


@dataclass(frozen=True)
class ClipByNorm(Clip):
    """Scales a tensor down to ‖x‖₂ = limit where it is longer. See Clip."""

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        return _clip_by_norm(x, self.limit)[0], {}


@dataclass(frozen=True)
class QuantileStage(AdaptiveEncodingStage):
    """What the adaptive stages share: an estimate of a quantile of the clients' sizes (Andrew 2021, §2).

    A client reports one byte: whether its size is at most the estimate C. Where that holds for a share b of a cohort,
    the next round has C · exp(−rate · (b − quantile)), so that C moves to the quantile and stays about there. Each
    tensor has its own estimate; for one of the whole model, encode it joint.
    """

    initial: float
    quantile: float
    rate: float

    def __post_init__(self) -> None:
        _check_positive("initial", self.initial)
        if not 0 < self.rate <= 100:
            raise ValueError(f"rate must be positive and at most 100, not {self.rate}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be from 0 to 1, not {self.quantile}")

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """None."""
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

    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """As Adaptive.update_state."""
        share = float(aggregated["within"].double().mean())
        estimate = float(state["estimate"]) * math.exp(-self.rate * (share - self.quantile))
        # zero and infinity would never be left again
        return {"estimate": torch.tensor(min(max(estimate, _FLOAT32.tiny), _FLOAT32.max), dtype=torch.float32)}

    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """As AdaptiveEncodingStage.encode."""
        y, within = self._limit(x, float(params["estimate"]))
        return y, {}, {"within": torch.tensor(within)}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        """As AdaptiveEncodingStage.decode."""
        return y.clone()

    @abstractmethod
    def _limit(self, x: Tensor, estimate: float) -> tuple[Tensor, bool]:
        """Returns what travels instead of `x`, and whether the size of `x` is at most the estimate."""


@dataclass(frozen=True)
class AdaptiveQuantileClip(QuantileStage):
    """Clips at an estimate of a quantile of the clients' norms (Andrew 2021), here without its noise.

    by: "norm" scales x down to that norm; "value" takes the quantile of the largest magnitudes, and cuts each element
    off there. For the other arguments see QuantileStage.
    """

    initial: float = 1.0
    quantile: float = 0.8
    rate: float = 0.2
    by: Literal["norm", "value"] = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("norm", "value"):
            raise ValueError(f"by must be norm or value, not {self.by!r}")

    def _limit(self, x: Tensor, estimate: float) -> tuple[Tensor, bool]:
        if self.by == "norm":
            return _clip_by_norm(x, estimate)
        return _clip_by_value(x, estimate), largest_magnitude(x) <= estimate


@dataclass(frozen=True)
class ZeroOutliers(QuantileStage):
    """Sends zeros for a tensor whose largest magnitude is beyond multiplier · C + increment: corrupt, more likely.

    C is the estimate of a quantile of the clients' largest magnitudes, see QuantileStage. As in TensorFlow Federated
    (zeroing_factory), whose values are the defaults: C soon follows to a little above the largest seen.
    """

    initial: float = 10.0
    quantile: float = 0.98
    rate: float = math.log(10)
    multiplier: float = 2.0
    increment: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("multiplier", self.multiplier)
        if not 0 <= self.increment < math.inf:
            raise ValueError(f"increment must be 0 or more, not {self.increment}")

    def _limit(self, x: Tensor, estimate: float) -> tuple[Tensor, bool]:
        largest = largest_magnitude(x)
        return torch.zeros_like(x) if largest > self.multiplier * estimate + self.increment else x, largest <= estimate


def _clip_by_value(x: Tensor, limit: float) -> Tensor:
    """Returns `x` cut off at ±limit."""
    limit = min(limit, torch.finfo(x.dtype).max)
    return x.clamp(-limit, limit)


def _clip_by_norm(x: Tensor, limit: float) -> tuple[Tensor, bool]:
    """Returns `x`, scaled down to ‖x‖₂ = limit where it is longer, and whether it is not."""
    largest = largest_magnitude(x)
    # ‖x‖ / max |x|, from 1 to √n: no overflow, whatever x
    ratio = math.sqrt(sums(x, lambda part: exact_divide(part, largest).square())[0]) if largest else 0.0
    if largest * ratio <= limit:
        return x, True
    unit = exact_divide(x.to(torch.promote_types(x.dtype, torch.float32)), largest)
    return unit.mul_(limit / ratio).to(x.dtype), False


def _check_positive(name: str, value: float) -> None:
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:
        raise ValueError(f"{name} must be positive, and within float32's range, not {value}")
