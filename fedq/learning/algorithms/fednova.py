"""FedNova: updates normalised by the amount of local work."""

from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override

from fedq.errors import FedqError
from fedq.learning.algorithm import FedAvg, Weighing
from fedq.learning.local_training import LocalTraining, TrainingMetrics


@dataclass(frozen=True)
class FedNova(FedAvg):
    """FedNova (Wang 2020, equations 6 to 9): clients that take more steps do not pull the mean towards themselves.

    The update of client i is divided by a_i, the norm of its accumulated gradients. The mean of the divided updates is
    multiplied by the weighted mean of all a_i. For plain SGD, a_i is the number of steps, which the client reports.
    Section 4.2 of the paper gives a_i for momentum ρ, and for a proximal term μ at rate η.
    """

    @override
    def check(self, training: LocalTraining) -> None:
        if training.optimizer or training.keep_optimizer:
            raise FedqError(
                "algorithm=fednova needs client.optimizer=null and client.keep_optimizer=false: its formula "
                "holds for SGD, and for momentum that starts from 0"
            )
        if training.schedule and training.proximal:
            raise FedqError("algorithm=fednova takes client.schedule or client.proximal, not both")
        if training.momentum and training.proximal:
            raise FedqError("algorithm=fednova takes client.momentum or client.proximal, not both")
        if training.lr * training.proximal >= 1:
            raise FedqError(
                "algorithm=fednova needs client.lr · client.proximal below 1: otherwise the proximal term alone "
                "overshoots the received weights"
            )

    @override
    def weigh(self, weight: int, training: LocalTraining, metrics: TrainingMetrics) -> Weighing:
        work = _work(training, metrics.steps)
        return Weighing(weight, 1 / work, {"work": weight * work})

    @override
    def rescale(self, sums: Mapping[str, float], weight: int) -> float:
        return sums["work"] / weight


def _work(training: LocalTraining, steps: int) -> float:
    """Returns the norm ‖a‖₁ of `steps` accumulated gradients."""
    if rho := training.momentum:
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    if decay := training.lr * training.proximal:
        return (1 - (1 - decay) ** steps) / decay
    return float(steps)
