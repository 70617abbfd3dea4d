"""RoLoRA: rounds that train B alternate with rounds that train A."""

from collections.abc import Collection
from dataclasses import dataclass

from typing_extensions import override

from fedq.learning.algorithm import FedAvg
from fedq.learning.algorithms.flex_lora import pairs


@dataclass(frozen=True)
class RoLoRA(FedAvg):
    """RoLoRA (Chen 2025): clients train and send B alone in the first round, A alone in the second, and so on.

    While one matrix rests, the mean of the products B·A is the product of the means. Uploads are half as long as those
    of fedavg. Broadcasts have both matrices, because a client may have missed rounds. All other tensors train always.
    """

    @override
    def phases(self, parameters: Collection[str]) -> list[set[str]]:
        every_a, every_b = zip(*pairs(parameters), strict=True)
        return [set(every_a), set(every_b)]
