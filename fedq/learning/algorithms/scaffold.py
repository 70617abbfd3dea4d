"""SCAFFOLD: control variates correct each client's drift."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.schema import Schema, Tensors
from fedq.errors import FedqError
from fedq.learning.algorithm import FedAvg, Weighing
from fedq.learning.local_training import LocalTraining, TrainingMetrics
from fedq.learning.round import Received

GROUP = "control"
_PREFIX = f"*{GROUP}/"


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """SCAFFOLD (Karimireddy 2020, algorithm 1, option II).

    The server keeps a control variate c, and each client i keeps its own, c_i. All start at 0. A client steps along
    gradient − c_i + c, and sends the change of c_i beside its update. After K steps of rate η from weights x to y, the
    change is (x − y) / (K·η) − c. The server adds the mean change, times the share of clients in the round, to c. The
    mean is over clients, not over examples, as in the paper.

    Both c and the changes pass the run's encoders. A client adds the change as the server decodes it to c_i. So c stays
    the mean of all c_i, also with a lossy encoder. But if the server clips or leaves out an answer that was sent, c and
    that mean differ from then on.
    """

    @override
    def groups(self, parameters: Tensors) -> dict[str, dict[str, Tensor]]:
        return {GROUP: {_PREFIX + name: torch.zeros_like(value) for name, value in parameters.items()}}

    @override
    def kept_schema(self, parameters: Schema) -> Schema:
        return {_PREFIX + name: spec for name, spec in parameters.items()}

    @override
    def check(self, training: LocalTraining) -> None:
        if training.momentum or training.proximal or training.optimizer:
            raise FedqError(
                "algorithm=scaffold needs client.momentum=0, client.proximal=0 and client.optimizer=null: it assumes "
                "plain SGD"
            )
        if training.weight == "targets":
            raise FedqError("algorithm=scaffold needs client.weight=uniform: its mean is over clients")

    @override
    def correct(
        self, gradients: dict[str, Tensor], weights: Mapping[str, Tensor], received: Received, kept: Tensors
    ) -> None:
        for name, gradient in gradients.items():
            gradient.add_(received.groups[_PREFIX + name])
            if kept:
                gradient.sub_(kept[_PREFIX + name].to(gradient.device))

    @override
    def upload(
        self, update: Tensors, steps: int, training: LocalTraining, received: Received, kept: Tensors
    ) -> dict[str, dict[str, Tensor]]:
        control = {name.removeprefix(_PREFIX): value for name, value in received.groups.items()}
        rate = steps * training.lr
        if not rate:
            raise FedqError(
                f"client.schedule gives the rate 0 in round {received.attempt + 1}, and algorithm=scaffold divides by "
                "the rate"
            )
        return {GROUP: {_PREFIX + name: -update[name] / rate - value for name, value in control.items()}}

    @override
    def keep(self, decoded: Tensors, kept: Tensors) -> dict[str, Tensor]:
        return {name: kept[name] + change.cpu() if kept else change.cpu() for name, change in decoded.items()}

    @override
    def weigh(self, weight: int, training: LocalTraining, metrics: TrainingMetrics) -> Weighing:
        return Weighing(1)

    @override
    def step(self, groups: Tensors, means: Tensors, share: float) -> dict[str, Tensor]:
        return {name: control + share * means[name].to(control.dtype) for name, control in groups.items()}
