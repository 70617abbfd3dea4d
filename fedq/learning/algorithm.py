"""The interface of an algorithm. The defaults are Federated Averaging's."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from fedq.encoding.schema import Schema, Tensors
from fedq.learning.local_training import LocalTraining, TrainingMetrics
from fedq.learning.round import Received


class Weighing(NamedTuple):
    """How much a client's update counts.

    weight: The weight in the mean of the weights; groups have a plain mean.
    scale: The factor of the update in the sum.
    sums: Other numbers to add up over clients, for `FedAvg.rescale`.
    """

    weight: int
    scale: float = 1.0
    sums: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class FedAvg:
    """Federated Averaging (McMahan 2016, algorithm 1): clients send updates, the server takes their weighted mean.

    Another algorithm overrides some of these methods. A *group* is a further set of tensors that both sides send, in
    separate messages. The run's encoders encode all groups. The tensors of a group are named `*group/parameter`. These
    names differ from all others in keys, messages and stores.

    frozen: Shell patterns of the names of tensors that do not change and are not sent: parameters to freeze, and
        buffers that are constant. Parameters with requires_grad=False need no pattern.
    personal: Shell patterns of the names of tensors that clients keep and never send. Examples are batch norms (FedBN,
        Li 2021) and last layers (FedPer, Arivazhagan 2019). A new client starts from the first weights.
    """

    frozen: Sequence[str] = ()
    personal: Sequence[str] = ()

    def groups(self, parameters: Tensors) -> dict[str, dict[str, Tensor]]:
        """Returns the server's tensors of each group before the first round."""
        return {}

    def kept_schema(self, parameters: Schema) -> Schema:
        """Returns the schema of what each client keeps between its rounds."""
        return {}

    def phases(self, parameters: Collection[str]) -> list[set[str]]:
        """Returns the parameters that rest in each round of a cycle. Clients neither train nor send resting parameters.

        By default a cycle is one round, in which no parameter rests.
        """
        return [set()]

    def check(self, training: LocalTraining) -> None:
        """Raises FedqError for local training that the algorithm does not allow."""

    # the client's half

    def correct(
        self, gradients: dict[str, Tensor], weights: Mapping[str, Tensor], received: Received, kept: Tensors
    ) -> None:
        """Changes the gradients of a step in place. The step starts from `weights`."""

    def upload(
        self, update: Tensors, steps: int, training: LocalTraining, received: Received, kept: Tensors
    ) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors of each group to send, after `steps` steps that gave `update`."""
        return {}

    def keep(self, decoded: Tensors, kept: Tensors) -> dict[str, Tensor]:
        """Returns what the client keeps. `decoded` holds the groups' tensors as the server decodes them."""
        return {}

    # the server's half

    def weigh(self, weight: int, training: LocalTraining, metrics: TrainingMetrics) -> Weighing:
        """Returns the weight of an update, from the client's registered weight and its report."""
        return Weighing(weight)

    def to_sum(self, update: Tensors, received: Tensors) -> dict[str, Tensor]:
        """Returns what the server adds up for a client's decoded update: by default, the update.

        received: The weights that the client received.
        """
        return dict(update)

    def from_sum(self, sums: Tensors, weight: int, weights: Tensors) -> dict[str, Tensor]:
        """Returns the weighted sum of updates from the weighted sum of what `to_sum` gives.

        sums: The sum; floating tensors are multiplied by their clients' weights.
        weight: The sum of the weights.
        weights: The server's weights before the round.
        """
        return dict(sums)

    @property
    def sums_updates(self) -> bool:
        """Whether the server adds up updates. If so, some encoders allow a sum of encoded updates."""
        return type(self).to_sum is FedAvg.to_sum

    def rescale(self, sums: Mapping[str, float], weight: int) -> float:
        """Returns the factor of the mean update. `sums` and `weight` are totals over the cohort."""
        return 1.0

    def step(self, groups: Tensors, means: Tensors, share: float) -> dict[str, Tensor]:
        """Returns the server's tensors of the groups after a round.

        means: The mean of what clients sent, for each tensor of `groups`.
        share: The share of the population whose updates were used.
        """
        return {}
