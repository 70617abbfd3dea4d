"""A guard against updates whose norm is far out of line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedq.errors import check_choice, check_range
from fedq.learning.failures import ClientFailure

Action = Literal["clip", "drop"]


def norm(update: Mapping[str, Tensor]) -> float:
    """Returns the Euclidean norm over all floating tensors; infinity if a tensor's norm overflows float32."""
    floating = [tensor for tensor in update.values() if tensor.is_floating_point()]
    return math.hypot(*(float(torch.linalg.vector_norm(tensor.float())) for tensor in floating))


@dataclass(frozen=True)
class NormGuard:
    """Clips (Sun 2019) or drops updates whose norm is above a limit that follows the rounds.

    The limit is `multiple` times an estimate of a quantile of the norms. After each round the server takes the quantile
    of the round's norms, and moves the estimate towards it (geometric mean). Adaptive clipping (Andrew 2021, §2)
    estimates the quantile from counts of clients below it, because there no client shows its norm. If outliers are
    fewer than a share of 1 − quantile, the estimate stays within the range of honest norms.

    The norm is that of the tensors that the server adds up, over all groups. Stages that commute with the sum are not
    decoded first.

    action: "clip" scales an update down to the limit, "drop" leaves the client out.
    quantile: The quantile of the round's norms, 0 to 1.
    multiple: The limit in multiples of the estimate.
    rate: The weight of a round in the estimate, above 0 and at most 1.
    initial: The estimate before the first round; if None, the first round has no limit.
    """

    action: Action
    quantile: float = 0.5
    multiple: float = 3.0
    rate: float = 0.5
    initial: float | None = None

    def __post_init__(self) -> None:
        check_choice("action", self.action, Action)
        check_range("quantile", self.quantile, 0, 1)
        check_range("rate", self.rate, above=0, high=1)
        check_range("multiple", self.multiple, above=0)
        check_range("initial", self.initial, above=0, optional=True)

    def scale(self, norm: float, estimate: float) -> float:
        """Returns the factor for an update of this norm: 1, or less if the update is clipped.

        norm: The update's norm.
        estimate: The estimate after the last round; 0 before the first.

        Raises ClientFailure if the update is dropped. An infinite norm cannot be clipped.
        """
        limit = self.multiple * (estimate or self.initial or math.inf)
        if math.isfinite(norm) and norm <= limit:
            return 1.0
        if self.action == "drop" or not math.isfinite(norm):
            raise ClientFailure("outlier", f"its update has norm {norm:.3g}, the limit is {limit:.3g}")
        return limit / norm

    def update(self, estimate: float, norms: Sequence[float]) -> float:
        """Returns the estimate after a round. `norms` are those of all updates, also of clipped and dropped ones."""
        # "lower" takes one of the norms: a mean of two could be infinite
        found = float(np.quantile(norms, self.quantile, method="lower")) if norms else 0.0
        before = estimate or self.initial
        if not 0 < found < math.inf:
            return estimate
        return before ** (1 - self.rate) * found**self.rate if before else found
