"""Local training: the steps of a client's optimizer."""

import random
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedq.data import Examples
from fedq.data.augment import Augment
from fedq.errors import FedqError, check_choice, check_range
from fedq.keys import Key
from fedq.learning.failures import ClientFailure, SharedDraw, unable
from fedq.learning.optimizers import SGD, ClientOptimizer, OfTorch, Rates, Schedule, Steps
from fedq.learning.parts import load
from fedq.learning.task import Classification, Task, TaskError, check_examples, check_fit, outputs_of, summable

CLASSIFICATION = Classification()

Projection = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Returns what a client can send of the gradients of a model's parameters."""

Precision = Literal["float32", "bf16"]
"""The precision of matrix products and convolutions: "float32" is the model's own, "bf16" is torch.autocast's."""

Weight = Literal["examples", "targets", "uniform"]
"""A client's weight in the mean: its number of examples, its number of targets that count, or 1."""

Correction = Callable[[dict[str, Tensor], Mapping[str, Tensor]], None]
"""Changes the gradients of a step in place, given the parameters that the step starts from."""


class TrainingMetrics(NamedTuple):
    """The numbers that a client reports from local training.

    sums: The sums from which the task's metrics follow: the task's `reported`, "targets" and "loss". "targets" is the
        number of seen targets that count. "loss" is the sum of the losses of these targets, each before the step on its
        batch.
    seen: The number of examples seen.
    steps: The number of optimizer steps.
    """

    sums: Mapping[str, float]
    seen: int
    steps: int


@dataclass(frozen=True)
class LocalTraining:
    """Local training (McMahan 2016, ClientUpdate) with FedProx's proximal term (Li 2020, eq. 2).

    Each epoch takes the client's examples once, in a random order. The last batch may be smaller.

    lr: The learning rate, as of torch.optim.
    epochs: The number of epochs in a round.
    batch_size: The number of examples of a step.
    momentum: The momentum of SGD, as of torch.optim.SGD.
    proximal: FedProx's μ, which pulls towards the received weights.
    max_examples: The largest number of examples that a client uses in a round, chosen at random; None for all.
    structured: Whether each step is projected so that the upload can send the update exactly (structured updates,
        Konečný 2016, §2).
    weight: The client's weight in the mean: its number of examples, its number of targets that count, or 1.
    steps: The number of steps in a round, over several epochs if needed; None for `epochs`.
    optimizer: Builds the optimizer; None for SGD.
    max_grad_norm: The largest joint norm of a step's gradients; larger gradients are scaled down. None for no limit.
    schedule: Changes `lr` over the rounds, with a step for each round; None for the same rate in all rounds.
    keep_optimizer: Whether a client keeps the optimizer's state until the client's next round.
    augment: Changes an epoch's inputs at random; None to train on the inputs as they are.
    """

    lr: float
    epochs: int = 1
    batch_size: int = 20
    momentum: float = 0.0
    proximal: float = 0.0
    max_examples: int | None = None
    structured: bool = False
    weight: Weight = "examples"
    steps: int | None = None
    optimizer: ClientOptimizer | None = None
    max_grad_norm: float | None = None
    schedule: Schedule | None = None
    keep_optimizer: bool = False
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_range("lr", self.lr, above=0)
        for name in ("epochs", "batch_size"):
            check_range(name, getattr(self, name), 1, integer=True)
        for name in ("max_examples", "steps"):
            check_range(name, getattr(self, name), 1, integer=True, optional=True)
        if self.steps and self.epochs != 1:
            raise ValueError("give epochs or steps, not both")
        check_range("momentum", self.momentum, 0, below=1)
        if self.momentum and self.optimizer:
            raise ValueError("momentum must be 0 with another optimizer than SGD")
        if self.keep_optimizer and not self.momentum and not self.optimizer:
            raise ValueError("keep_optimizer must be false with plain SGD, which has no state")
        check_range("max_grad_norm", self.max_grad_norm, above=0, optional=True)
        check_choice("weight", self.weight, Weight)
        check_range("proximal", self.proximal, 0)

    def at(self, round: int) -> "LocalTraining":
        """Returns the training of a round, with the round's learning rate, which may be 0. Rounds count from 0."""
        if self._rates is None:
            return self
        training = copy(self)
        object.__setattr__(training, "lr", self._rates(round))
        return training

    @cached_property
    def _rates(self) -> Rates | None:
        return Rates(self.lr, self.schedule, "client.schedule") if self.schedule else None

    def optimizer_of(self, parameters: Mapping[str, Tensor]) -> Steps:
        """Returns a new optimizer of the parameters, given by name."""
        if self.optimizer is None:
            return SGD(parameters, self.lr, self.momentum)
        return OfTorch(parameters, self.optimizer, self.lr)

    def _steps(self, examples: int) -> int:
        """Returns the number of steps of a client with this number of examples."""
        return self.steps or self.epochs * -(-examples // self.batch_size)

    def can_give(self, metrics: TrainingMetrics, examples: int) -> bool:
        """Returns whether a client with this number of examples can report these numbers of steps and examples seen.

        A server refuses other reports. A subclass that takes another number of steps overrides the method.
        """
        used = min(examples, self.max_examples or examples)
        return bool(used) and metrics.steps == self._steps(used) and metrics.seen == self.seen(used)

    def seen(self, examples: int) -> int:
        """Returns the number of examples in all steps of a round, for a client that uses `examples`."""
        epochs, rest = divmod(self._steps(examples), -(-examples // self.batch_size)) if examples else (0, 0)
        return epochs * examples + rest * self.batch_size

    def chosen(self, examples: int, key: Key) -> np.ndarray:
        """Returns the places of the examples that a client uses in a round, in the order of the first epoch.

        examples: The number of the client's examples.
        key: The key of `train`.
        """
        return key.fold("shuffle").fold("0").permutation(examples)[: self.max_examples]

    def train(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        examples: Examples,
        key: Key,
        project: Projection | None = None,
        precision: Precision = "float32",
        correct_gradients: Correction | None = None,
        task: Task = CLASSIFICATION,
        kept: dict[str, Tensor] | None = None,
    ) -> TrainingMetrics:
        """Loads `weights` into `model`, trains it in place on the model's device, and returns the metrics.

        model: The network.
        weights: The state_dict to start from. It may lack frozen parameters.
        examples: The client's examples, at least one.
        key: The key of the examples' order.
        project: Projects each step's gradients on a linear subspace; None for no projection.
        precision: The precision of matrix products and convolutions. Weights, gradients and steps keep the model's
            dtype.
        correct_gradients: Changes each step's gradients last; None if the algorithm has no correction.
        task: Gives the loss and the sums.
        kept: The optimizer's state before training, which the state after training replaces. Empty in a client's first
            round; None if the state is not kept.

        Raises TaskError if the examples or the model's outputs do not fit the task. Raises SharedDraw if the model
        draws from a generator that all threads share. In `KeyedDraws`, torch's functions use the client's generator.
        """
        all_x, all_y = (part.detach() for part in check_examples(examples))
        load(model, weights)
        model.train()
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        device = next(iter(parameters.values())).device
        optimizer = self.optimizer_of(parameters)
        if kept:
            optimizer.load(kept)
        all_x, all_y = all_x.to(device), all_y.to(device)
        seen = steps = 0
        sums: dict[str, float] = dict.fromkeys(("loss", *task.reported, "targets"), 0)
        order = self.chosen(len(examples.y), key)
        chosen, before, epoch = np.sort(order), generators(device), 0
        while steps < self._steps(len(chosen)):
            if epoch:
                order = chosen[key.fold("shuffle").fold(str(epoch)).permutation(len(chosen))]
            places = torch.from_numpy(order[: (self._steps(len(chosen)) - steps) * self.batch_size]).to(device)
            x, y = all_x[places], all_y[places]
            if self.augment is not None:
                x = self.augment(x, torch.Generator().manual_seed(key.fold("augment").fold(str(epoch)).integer()))
            epoch += 1
            for start in range(0, len(places), self.batch_size):
                batch_x, batch_y = x[start : start + self.batch_size], y[start : start + self.batch_size]
                for parameter in parameters.values():  # Module.zero_grad looks for the parameters again
                    parameter.grad = None
                # bfloat16 has the range of float32: gradients need no scaling
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    outputs = outputs_of(model(batch_x))
                if not steps:
                    check_fit(task, outputs, len(batch_y), all_y)
                loss, targets = task.loss(outputs, batch_y), task.count(batch_y)
                torch.autograd.backward(loss)
                gradients = {name: g for name, p in parameters.items() if (g := p.grad) is not None}
                if project is not None:
                    for name, projected in project(gradients).items():
                        gradients[name].copy_(projected)
                if self.proximal:
                    for name, gradient in gradients.items():
                        gradient.add_(parameters[name].detach() - weights[name], alpha=self.proximal)
                if self.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters.values(), self.max_grad_norm)
                if correct_gradients is not None:
                    correct_gradients(gradients, {name: parameters[name].detach() for name in gradients})
                optimizer.step(gradients)
                of_batch = {
                    **task.sums(outputs.detach(), batch_y),
                    "targets": targets,
                    "loss": float(loss.detach()) * targets,
                }
                sums = {name: value + summable(of_batch[name]) for name, value in sums.items()}
                seen += len(batch_y)
                steps += 1
        check_nothing_drawn(before, device)
        if kept is not None:
            kept.update(optimizer.state())
        return TrainingMetrics(sums, seen, steps)


def loaded(client: int, load: Callable[[], Examples], device: torch.device | None = None) -> Examples:
    """Returns examples of a client.

    client: The client's number, for errors.
    load: Reads the examples.
    device: Where a model trains on the examples; None for other uses, which may run beside a model that draws.

    Raises FedqError if a file cannot be read, which is no fault of the client. Raises TaskError unless the examples are
    two tensors of equal length. All other errors become ClientFailure. With a device, raises SharedDraw if `load` draws
    from a generator that all threads share.
    """
    before = generators(device) if device else {}
    try:
        examples = check_examples(load())
    except OSError as error:
        raise FedqError(f"the dataset's client {client} cannot be read: {error}") from error
    except TaskError as error:
        raise TaskError(f"with the examples of client {client}: {error}") from error
    except (FedqError, ClientFailure):
        raise
    except Exception as error:  # a dataset may raise any error
        raise unable(error) from error
    if device:
        check_nothing_drawn(before, device)
    return examples


def check_nothing_drawn(before: Mapping[str, Any], device: torch.device) -> None:
    """Raises SharedDraw if a generator that all threads share has changed since `generators` returned `before`."""
    after = generators(device)
    if drawn := [name for name in before if before[name] != after[name]]:
        raise SharedDraw(
            f"the model or the dataset draws random numbers from {drawn[0]}'s global generator, which all threads "
            "share: the run could not be repeated. In the model, draw with torch's functions, which use the client's "
            "generator in training. In the dataset, draw from a generator that belongs to the dataset"
        )


def generators(device: torch.device) -> dict[str, Any]:
    """Returns the states of the generators that all threads share; each draw changes its generator's state."""
    of_numpy: Any = np.random.get_state(legacy=False)
    states: dict[str, Any] = {
        # torch.get_rng_state would give the state of the client's generator in training
        "torch": torch.default_generator.get_state().numpy().tobytes(),
        "numpy": (of_numpy["state"]["key"].tobytes(), of_numpy["state"]["pos"], of_numpy["has_gauss"]),
        "Python": random.getstate(),
    }
    if device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def channels_last(model: nn.Module) -> nn.Module:
    """Returns `model` with the channels of its 4-D tensors last in memory; convolutions are about a tenth faster.

    The order on the wire stays the same.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)  # not `contiguous`: it keeps one channel
    return model


def update_of(trained: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a client's update: trained − received for floating tensors, the trained value for all others.

    Works in place: `trained` is used up, because new memory costs a page fault for every 4 KiB. Integers and booleans
    (a batch norm's num_batches_tracked) have no difference, which could overflow their dtype.
    """
    return {
        name: value.detach().sub_(received[name]) if value.is_floating_point() else value
        for name, value in trained.items()
    }
