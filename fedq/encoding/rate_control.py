"""How coarse a direction is, following earlier rounds: factors of the common scale, and so of every step."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.encoding.adaptive import Adaptive, StateUpdate
from fedq.encoding.schema import Tensors, TensorSpec

_NUMBER = TensorSpec((), torch.float32)


class RateController(Adaptive):
    """State on the server that gives `factor`, what the common scale of a StateDictEncoder is multiplied with.

    Clients report one number a message, 4 bytes, and are sent the factor, 4 bytes, in each broadcast.
    """

    reports: str
    """What is reported: "bits", of payloads for each parameter, or "loss", that of local training."""

    def params(self, state: Tensors) -> Tensors:
        """As Adaptive.params: the factor."""
        return {"factor": state["factor"]}

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """As Adaptive.update_spec: one number a client."""
        return {self.reports: StateUpdate(_NUMBER, "stack")}

    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """As Adaptive.update_state; what is not a positive number is not believed."""
        reported = aggregated[self.reports].double()
        believed = reported[(reported > 0) & reported.isfinite()]
        return self.followed(state, float(believed.median())) if len(believed) else state

    @abstractmethod
    def followed(self, state: Tensors, reported: float) -> Tensors:
        """Returns the state after a round whose clients' reports have this median."""


@dataclass(frozen=True)
class BitBudget(RateController):
    """Has the tensors of messages take `bits` a parameter, whatever the model and however it changes over the rounds.

    The steps of all tensors grow and shrink together, which is where the squared error is least for the bits that they
    take in all ("equal slope", Shoham and Gersho 1988). How the bits depend on the factor is learnt: as its power,
    through the last two rounds (the secant method).

    bits: above 0.
    """

    bits: float
    reports = "bits"

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise ValueError(f"bits must be above 0, not {self.bits}")

    def initial_state(self, spec: TensorSpec) -> Tensors:
        """As Adaptive.initial_state; `before` are the last round's factor and bits, to which `power` led."""
        return {"factor": torch.tensor(1.0), "before": torch.zeros(2), "power": torch.tensor(-1.5)}

    def followed(self, state: Tensors, reported: float) -> Tensors:
        """As RateController.followed."""
        factor, power, before = float(state["factor"]), float(state["power"]), state["before"].tolist()
        if before[0] and abs(step := math.log(factor / before[0])) > 0.01:
            # few bits fall off steeply; where training itself moved them, the power must stay believable
            power = min(max(math.log(reported / before[1]) / step, -5.0), -0.7)
        aim = factor * 2 ** min(max((math.log2(self.bits) - math.log2(reported)) / power, -3), 3)
        aim = min(max(aim, 2.0**-20), 2.0**20)
        now = {"factor": aim, "before": [factor, reported], "power": power}
        return {name: torch.tensor(value) for name, value in now.items()}


@dataclass(frozen=True)
class FollowLoss(RateController):
    """Halves the steps whenever training stalls (DAdaQuant, Hönig 2021, §3.4), for uploads.

    It starts with steps `start` times as large and ends with them as they are. The median over a cohort of its clients'
    training losses (there: the weighted mean of those before it) is averaged over the rounds, with `memory`, the weight
    of what was before; where that average is no lower than it was `patience` rounds ago the factor is halved, and as
    many rounds pass before it may be again.

    start: 1 to 2^20. memory: from 0 to below 1. patience: 1 to 10,000 rounds.
    """

    start: float = 8.0
    memory: float = 0.9
    patience: int = 10
    reports = "loss"

    def __post_init__(self) -> None:
        if not 1 <= self.start <= 2**20:
            raise ValueError(f"start must be from 1 to 2^20, not {self.start}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be from 0 to below 1, not {self.memory}")
        if not 1 <= self.patience <= 10_000:
            raise ValueError(f"patience must be from 1 to 10,000, not {self.patience}")

    def initial_state(self, spec: TensorSpec) -> Tensors:
        """As Adaptive.initial_state: averages of the last rounds, the newest last."""
        return {"factor": torch.tensor(float(self.start)), "losses": torch.full((self.patience + 1,), math.inf)}

    def followed(self, state: Tensors, reported: float) -> Tensors:
        """As RateController.followed."""
        before, factor = state["losses"], float(state["factor"])
        newest = float(before[-1])
        average = reported if math.isinf(newest) else self.memory * newest + (1 - self.memory) * reported
        losses: Tensor = torch.cat((before[1:], torch.tensor([average])))
        if average >= float(losses[0]) and factor > 1:
            losses[:-1] = math.inf
            return {"factor": torch.tensor(max(1.0, factor / 2)), "losses": losses}
        return {"factor": state["factor"], "losses": losses}
