"""Uniform quantisation."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.spec import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.keys import Key

_CHUNK = 1 << 17  # elements worked on at a time: the working set stays in the cache


@dataclass(frozen=True)
class UniformQuantization(EncodingStage):
    """Quantises to 2^bits evenly spaced values from the tensor's minimum to its maximum, both included.

    Takes a floating tensor of any shape; gives symbols 0 … 2^bits − 1 of the same shape (uint8 up to 8 bits, else
    int32) and the range as two side values. With step = (max − min) / (2^bits − 1), `stochastic` rounds up with a
    probability equal to the fraction (Konečný 2016, §4; Suresh 2017, §2.2): unbiased, squared error step²/6 at high
    rate. `nearest` has half that error, step²/12, and is biased.

    bits: 1 to 16. rounding: "stochastic" or "nearest".
    """

    bits: int = 8
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits must be from 1 to 16, not {self.bits}")
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding must be stochastic or nearest, not {self.rounding!r}")

    @property
    def unbiased(self) -> bool:  # type: ignore[override]  # a capability may depend on the arguments
        """True with stochastic rounding."""
        return self.rounding == "stochastic"

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensor's minimum and maximum: float64 for a float64 tensor, else float32."""
        if not spec.dtype.is_floating_point:
            raise ValueError(f"UniformQuantization takes floating tensors, not {spec.dtype}")
        bound = TensorSpec((), torch.float64 if spec.dtype == torch.float64 else torch.float32)
        return {"minimum": bound, "maximum": bound}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        if not 0 <= float(side["maximum"]) - float(side["minimum"]) < math.inf:
            raise ValueError(f"from {side['minimum']} to {side['maximum']} is not a finite range")
        return TensorSpec(spec.shape, torch.uint8 if self.bits <= 8 else torch.int32, 1 << self.bits)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        low, high = torch.aminmax(x) if x.numel() else (torch.zeros(()), torch.zeros(()))
        bound = self.side_spec(TensorSpec.of(x))["minimum"].dtype
        side = {"minimum": low.to("cpu", bound), "maximum": high.to("cpu", bound)}
        minimum, step, work = self._scale(side)
        symbols = torch.empty(x.shape, dtype=torch.uint8 if self.bits <= 8 else torch.int32, device=x.device)
        if step == 0:
            return symbols.zero_(), side
        bits, top = key.bit_generator(), (1 << self.bits) - 1
        flat, out = x.reshape(-1), symbols.view(-1)
        for start in range(0, len(flat), _CHUNK):
            scaled = flat[start : start + _CHUNK].to(work, copy=True).sub_(minimum).div_(step)
            if self.rounding == "stochastic":
                # 16 random bits an element as numbers evenly spread in (0, 1), then floor
                random = bits.random_raw(-(-len(scaled) // 4)).view(np.int16)[: len(scaled)]
                scaled.add_(torch.from_numpy(random).to(x.device), alpha=2**-16).add_(0.5 + 2**-17)
            else:
                scaled.add_(0.5)
            out[start : start + _CHUNK] = scaled.clamp_(0, top)
        return symbols, side

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        minimum, step, work = self._scale(side)
        # clamped, as the last step may round beyond the maximum and so beyond the dtype
        return y.to(work).mul_(step).add_(minimum).clamp_(max=float(side["maximum"])).to(spec.dtype)

    def _scale(self, side: Tensors) -> tuple[float, float, torch.dtype]:
        """Returns minimum, step and the dtype to work in: float32 where its range and precision suffice."""
        minimum, maximum = float(side["minimum"]), float(side["maximum"])
        extent = maximum - minimum
        narrow = side["minimum"].dtype == torch.float32 and self.bits <= 12 and 1e-30 < extent < 1e30
        return minimum, extent / ((1 << self.bits) - 1), torch.float32 if narrow else torch.float64
