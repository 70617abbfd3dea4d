"""What a client does: local training."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedq.data import Examples
from fedq.errors import FedqError
from fedq.keys import Key

Projection = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From the gradients of a model's parameters to what a client can send of them."""

Precision = Literal["float32", "bf16"]
"""What products of matrices and convolutions are computed in: as the model is, or in bfloat16 by torch.autocast."""


class TrainingMetrics(NamedTuple):
    """Sums over all examples seen in local training, in the model's state when it saw them."""

    loss: float
    correct: int
    seen: int


@dataclass(frozen=True)
class LocalTraining:
    """Local SGD (McMahan 2016, ClientUpdate) with heavy-ball momentum and FedProx's proximal term (Li 2020, eq. 2).

    Each epoch goes once over the client's examples in an order of its own; the last batch may be smaller. `lr` and
    `momentum` are torch.optim.SGD's; `proximal` is μ, which pulls towards the weights received. Of a client with more
    than `max_examples` a random choice of so many is used each round. `structured` keeps every step within what the
    client's upload can send, so that nothing of its update is lost (Konečný 2016, §2).
    """

    lr: float
    epochs: int = 1
    batch_size: int = 20
    momentum: float = 0.0
    proximal: float = 0.0
    max_examples: int | None = None
    structured: bool = False

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        for name in ("epochs", "batch_size", "max_examples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be 1 or more, not {count}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, not {self.momentum}")
        if not self.proximal >= 0:
            raise ValueError(f"proximal must be 0 or more, not {self.proximal}")

    def train(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        examples: Examples,
        key: Key,
        project: Projection | None = None,
        precision: Precision = "float32",
    ) -> TrainingMetrics:
        """Sets `model` to `weights` and trains it in place on `examples`, on the model's device.

        With `project`, a projection on a linear subspace, each step takes the projected gradient. `precision` is that
        of products of matrices and convolutions, where "bf16" has 8 bits instead of 24; weights, their gradients and
        steps are the model's dtype in either. Raises FedqError for a model that draws from torch's generator.
        """
        model.load_state_dict(weights)
        model.train()
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device
        velocities: dict[str, Tensor] = {}
        all_x, all_y = examples.x.to(device), examples.y.to(device)
        loss_sum, correct, seen = 0.0, 0, 0
        orders = key.fold("shuffle")
        order = orders.fold("0").permutation(len(examples.y))[: self.max_examples]
        chosen, before = np.sort(order), generators(device)
        for epoch in range(self.epochs):
            if epoch:
                order = chosen[orders.fold(str(epoch)).permutation(len(chosen))]
            places = torch.from_numpy(order).to(device)
            x, y = all_x[places], all_y[places]
            for start in range(0, len(order), self.batch_size):
                batch_x, batch_y = x[start : start + self.batch_size], y[start : start + self.batch_size]
                model.zero_grad()
                # bfloat16 has float32's range: no gradient vanishes, and none needs scaling
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = wide(model(batch_x))
                loss = F.cross_entropy(logits, batch_y)
                torch.autograd.backward(loss)
                gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
                if project is not None:
                    for name, projected in project(gradients).items():
                        gradients[name].copy_(projected)
                if self.proximal:
                    for name, gradient in gradients.items():
                        gradient.add_(parameters[name].detach() - weights[name], alpha=self.proximal)
                self._step(parameters, gradients, velocities)
                loss_sum += float(loss.detach()) * len(batch_y)
                correct += int((logits.detach().argmax(1) == batch_y).sum())
                seen += len(batch_y)
        check_nothing_drawn(before, device)
        return TrainingMetrics(loss_sum, correct, seen)

    def _step(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], velocities: dict[str, Tensor]
    ) -> None:
        """Takes one step of heavy-ball SGD: v ← momentum · v + gradient, w ← w − lr · v; the first v is the gradient.

        It keeps the `gradients`, and gives the bits of torch.optim.SGD, which would import the compiler for seconds.
        """
        with torch.no_grad():
            if self.momentum:
                for name, gradient in gradients.items():
                    before = velocities.get(name)
                    velocities[name] = gradient if before is None else before.mul_(self.momentum).add_(gradient)
            steps = velocities if self.momentum else gradients
            torch._foreach_add_([parameters[n] for n in gradients], [steps[n] for n in gradients], alpha=-self.lr)


def check_nothing_drawn(before: Mapping[str, Any], device: torch.device) -> None:
    """Raises FedqError where a generator that all threads share is not as `generators` found it."""
    after = generators(device)
    if drawn := [name for name in before if before[name] != after[name]]:
        raise FedqError(
            "the model draws random numbers while it trains, as nn.Dropout does, or the dataset while it is read, from "
            f"{drawn[0]}'s generator, which all threads share: no key governs them, and no run could be repeated; take "
            "such layers out, and seed what a dataset draws with"
        )


def generators(device: torch.device) -> dict[str, Any]:
    """Returns the states of the generators that all threads share, which change where something is drawn."""
    of_numpy: Any = np.random.get_state(legacy=False)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (of_numpy["state"]["key"].tobytes(), of_numpy["state"]["pos"], of_numpy["has_gauss"]),
        "Python": random.getstate(),
    }
    if device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def wide(logits: Tensor) -> Tensor:
    """Returns logits in float32, in which a loss is taken, float64 as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def channels_last(model: nn.Module) -> nn.Module:
    """Returns `model`, its 4-D tensors in memory with channels last; the order on the wire is unaffected.

    Convolutions are about a tenth faster so.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)  # `contiguous` leaves one channel as it is
    return model


def update_of(trained: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a client uploads: trained − received where floating, the trained value itself where not.

    Works in place: `trained` is used up, which spares a page fault for every 4 KiB of a large model. Integers and
    booleans (a batch norm's num_batches_tracked) would wrap in a difference of their own dtype.
    """
    return {
        name: value.detach().sub_(received[name]) if value.is_floating_point() else value
        for name, value in trained.items()
    }
