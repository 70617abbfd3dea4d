"""Rate control: the server scales the steps of one direction after each round, by a bit budget or by the loss."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.adaptive import Adaptive, StateUpdate
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.errors import check_range

_NUMBER = TensorSpec((), torch.float32)


class RateController(Adaptive):
    """State on the server that yields `factor`, by which a StateDictEncoder multiplies its common scale.

    The factor scales every step of the direction. Each broadcast carries the factor, and each client's message carries
    one report: 4 bytes each.
    """

    reports: str
    """The report: "bits" of payloads for each parameter, or the "loss" of local training."""

    def report(self, bits: float, loss: float | None) -> dict[str, Tensor]:
        """Returns a client's report, from the bits a parameter of its message and its training loss."""
        number = bits if self.reports == "bits" else loss
        if number is None:
            raise TypeError("rate control that follows the training loss must be given it: loss=")
        return {self.reports: torch.tensor(number, dtype=torch.float32)}

    @override
    def params(self, state: Tensors) -> Tensors:
        return {"factor": state["factor"]}

    @override
    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        return {self.reports: StateUpdate(_NUMBER, "stack")}

    @override
    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        reports = aggregated[self.reports].double()
        valid = reports[(reports > 0) & reports.isfinite()]
        return self.followed(state, float(valid.median())) if len(valid) else state

    @abstractmethod
    def followed(self, state: Tensors, reported: float) -> Tensors:
        """Returns the next round's state; `reported` is the median of the clients' positive, finite reports."""


@dataclass(frozen=True)
class BitBudget(RateController):
    """Scales all steps together so that messages take `bits` a parameter, in every round and for every model.

    At a given number of bits the squared error is least when all tensors have the same step ("equal slope", Shoham and
    Gersho 1988). After each round the factor moves by the secant method: bits are taken as a power of the factor,
    fitted to the last two rounds. At high rates bits change more slowly than a power: halving the step costs at most
    one bit a parameter. For a budget above one bit, the factor therefore at least doubles or halves for each bit too
    many or too few.

    Attributes:
        bits: budget in bits a parameter, above 0.
    """

    bits: float
    reports = "bits"

    def __post_init__(self) -> None:
        check_range("bits", self.bits, above=0)

    @override
    def initial_state(self, spec: TensorSpec) -> Tensors:
        # before: factor and bits of the round before; power: fitted to that round and the one before it
        return {"factor": torch.tensor(1.0), "before": torch.zeros(2), "power": torch.tensor(-1.5)}

    @override
    def followed(self, state: Tensors, reported: float) -> Tensors:
        factor, power, before = float(state["factor"]), float(state["power"]), state["before"].tolist()
        if before[0] and abs(step := math.log(factor / before[0])) > 0.01:
            # low rates fall steeply; the limits hold when training, not the factor, changed the bits
            power = min(max(math.log(reported / before[1]) / step, -5.0), -0.7)
        doublings = min(max((math.log2(self.bits) - math.log2(reported)) / power, -3), 3)
        if self.bits > 1:
            doublings = max(doublings, min(max(reported - self.bits, -40), 40), key=abs)
        aim = min(max(factor * 2**doublings, 2.0**-20), 2.0**20)
        after = {"factor": aim, "before": [factor, reported], "power": power}
        return {name: torch.tensor(value) for name, value in after.items()}


@dataclass(frozen=True)
class FollowLoss(RateController):
    """Halves the steps of uploads whenever training stalls (DAdaQuant, Hönig 2021, §3.4).

    Each round, the median of the clients' training losses enters a moving average. (The paper takes their weighted
    mean.) Training stalls when the average is no lower than `patience` rounds before. The factor stays at least
    `patience` rounds as it is.

    Attributes:
        start: first factor of the steps, 1 to 2^20. The factor is never below 1.
        memory: weight of the earlier average, from 0 to below 1.
        patience: rounds between the averages that are compared, 1 to 10,000.
    """

    start: float = 8.0
    memory: float = 0.9
    patience: int = 10
    reports = "loss"

    def __post_init__(self) -> None:
        check_range("start", self.start, 1, 2**20)
        check_range("memory", self.memory, 0, below=1)
        check_range("patience", self.patience, 1, 10_000, integer=True)

    @override
    def initial_state(self, spec: TensorSpec) -> Tensors:
        # losses: averages of the last rounds, newest last
        return {"factor": torch.tensor(float(self.start)), "losses": torch.full((self.patience + 1,), math.inf)}

    @override
    def followed(self, state: Tensors, reported: float) -> Tensors:
        before, factor = state["losses"], float(state["factor"])
        newest = float(before[-1])
        average = reported if math.isinf(newest) else self.memory * newest + (1 - self.memory) * reported
        losses: Tensor = torch.cat((before[1:], torch.tensor([average])))
        if average >= float(losses[0]) and factor > 1:
            losses[:-1] = math.inf
            return {"factor": torch.tensor(max(1.0, factor / 2)), "losses": losses}
        return {"factor": state["factor"], "losses": losses}
