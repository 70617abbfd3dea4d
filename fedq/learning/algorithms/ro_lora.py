"""RoLoRA: clients train B in one round, and A in the next."""

from collections.abc import Collection
from dataclasses import dataclass

from typing_extensions import override

from fedq.learning.algorithm import FedAvg
from fedq.learning.algorithms.flex_lora import pairs


@dataclass(frozen=True)
class RoLoRA(FedAvg):
    """RoLoRA (Chen 2025): clients train and send only B in the first round, only A in the second, and so on.

    While one matrix rests, the mean of the products B·A is the product of the means. Uploads are half as long as those
    of fedavg. Broadcasts have both matrices, because a client may have missed rounds. Clients train
    all other tensors in every round.
    """

    @override
    def phases(self, parameters: Collection[str]) -> list[set[str]]:
        every_a, every_b = zip(*pairs(parameters), strict=True)
        return [set(every_a), set(every_b)]
