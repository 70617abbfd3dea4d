"""A guard against updates whose norm is far out of line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedq.learning.failures import ClientFailure


def norm(update: Mapping[str, Tensor]) -> float:
    """Returns the Euclidean norm over all floating tensors together, infinity where it is beyond float32."""
    floating = [tensor for tensor in update.values() if tensor.is_floating_point()]
    return math.hypot(*(float(torch.linalg.vector_norm(tensor.float())) for tensor in floating))


@dataclass(frozen=True)
class NormGuard:
    """Clips (Sun 2019) or drops updates whose norm is more than `multiple` times a quantile of earlier rounds' norms.

    The limit follows the rounds, as in adaptive clipping (Andrew 2021, §2), which moves its estimate by how many
    clients were below it, for want of their norms. This server decodes every update: it takes the `quantile` of the
    round's norms itself and mixes it in geometrically, with a share of `rate`. The estimate q is off by no more than
    the norms of honest clients differ as long as outliers are fewer than a share of 1 − quantile. The norm is that of
    what the server adds up, so that a chain's front stages which commute with the sum are not undone for it.

    `initial` is the estimate before the first round; without it no update of that round is out of line.
    """

    action: Literal["clip", "drop"]
    quantile: float = 0.5
    multiple: float = 3.0
    rate: float = 0.5
    initial: float | None = None

    def __post_init__(self) -> None:
        if self.action not in ("clip", "drop"):
            raise ValueError(f"action must be clip or drop, not {self.action!r}")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be from 0 to 1, not {self.quantile}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, not {self.rate}")
        if not (self.multiple > 0 and (self.initial is None or 0 < self.initial < math.inf)):
            raise ValueError("multiple and initial must be above 0, and initial finite")

    def scale(self, norm: float, estimate: float) -> float:
        """Returns what to multiply an update of this `norm` with; `estimate` is 0 before the first round.

        Raises ClientFailure where the update is to be dropped, or cannot be clipped because its norm is infinite.
        """
        limit = self.multiple * (estimate or self.initial or math.inf)
        if math.isfinite(norm) and norm <= limit:
            return 1.0
        if self.action == "drop" or not math.isfinite(norm):
            raise ClientFailure("outlier", f"its update has norm {norm:.3g}, the limit is {limit:.3g}")
        return limit / norm

    def update(self, estimate: float, norms: Sequence[float]) -> float:
        """Returns the estimate after a round with updates of these norms, those dropped or clipped included."""
        # an order statistic, not a mean of two: one of them may be infinite
        found = float(np.quantile(norms, self.quantile, method="lower")) if norms else 0.0
        before = estimate or self.initial
        if not 0 < found < math.inf:
            return estimate
        return before ** (1 - self.rate) * found**self.rate if before else found
