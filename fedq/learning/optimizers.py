"""Optimizers of clients, and learning rates that change over the rounds."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fedq.encoding.schema import Tensors
from fedq.errors import FedqError

ClientOptimizer = Callable[..., torch.optim.Optimizer]
"""Builds a client's optimizer for parameters and `lr`, as torch.optim.AdamW or a functools.partial of a class does."""

Schedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
"""Builds a scheduler of an optimizer, as functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10) does."""

Result = TypeVar("Result")

PREFIX = "*optimizer/"
"""The start of the names of an optimizer's state in a client's store: *optimizer/parameter/name."""


class Steps(Protocol):
    """An optimizer that takes a client's steps."""

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Changes the parameters in place. `gradients` holds the `grad` of each parameter that has one."""

    def state(self) -> dict[str, Tensor]:
        """Returns the state, for the client's store."""

    def load(self, state: Tensors) -> None:
        """Sets a state that `state` returned in an earlier round."""


@dataclass
class SGD:
    """Heavy-ball SGD: v ← momentum · v + gradient, w ← w − lr · v; the first v is the gradient.

    The result has the bits of torch.optim.SGD. The first use of torch.optim.SGD would load torch's compiler, which
    takes seconds.

    parameters: The parameters by name.
    lr: As in torch.optim.SGD.
    momentum: As in torch.optim.SGD.
    velocities: v of each parameter that had a gradient.
    """

    parameters: Mapping[str, Tensor]
    lr: float
    momentum: float
    velocities: dict[str, Tensor] = field(default_factory=dict)

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Takes a step. The optimizer may keep the tensors of `gradients`."""
        velocities = self.velocities
        with torch.no_grad():
            if self.momentum:
                for name, gradient in gradients.items():
                    before = velocities.get(name)
                    velocities[name] = gradient if before is None else before.mul_(self.momentum).add_(gradient)
            steps = velocities if self.momentum else gradients
            changed = [self.parameters[name] for name in gradients]
            torch._foreach_add_(changed, [steps[name] for name in gradients], alpha=-self.lr)

    def state(self) -> dict[str, Tensor]:
        """Returns the velocities."""
        return {f"{PREFIX}{name}/velocity": value for name, value in self.velocities.items()}

    def load(self, state: Tensors) -> None:
        """Sets the velocities."""
        for name, parameter in self.parameters.items():
            self.velocities[name] = state[f"{PREFIX}{name}/velocity"].to(parameter.device, copy=True)


class OfTorch:
    """An optimizer of torch."""

    def __init__(self, parameters: Mapping[str, Tensor], build: ClientOptimizer, lr: float) -> None:
        """Builds the optimizer.

        parameters: The parameters by name.
        build: Builds the optimizer of torch.
        lr: The learning rate.
        """
        self._parameters, self._optimizer = parameters, build(parameters.values(), lr=lr)

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Takes a step along the parameters' `grad`."""
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Returns the state's tensors. Raises FedqError for a state that has other values."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for entry, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"{PREFIX}{name}/{entry}"] = value
                elif value is not None:
                    raise FedqError(
                        f"client.keep_optimizer: {entry!r} in the optimizer's state is not a tensor: {value!r}"
                    )
        return state

    def load(self, state: Tensors) -> None:
        """Sets the state's tensors."""
        parts: dict[int, dict[str, Tensor]] = {}
        for place, name in enumerate(self._parameters):
            prefix = f"{PREFIX}{name}/"
            entries = {path.removeprefix(prefix): value for path, value in state.items() if path.startswith(prefix)}
            parts[place] = {path: value.clone() for path, value in entries.items()}
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": parts})


def stepped(build: Callable[[Mapping[str, Tensor]], Steps], parameters: Tensors) -> Steps:
    """Returns an optimizer after a step on copies of the parameters, with gradients of 0.

    build: Builds the optimizer.
    parameters: The parameters by name.
    """
    leaves = {name: torch.zeros_like(value, device="cpu").requires_grad_() for name, value in parameters.items()}
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    optimizer = build(leaves)
    optimizer.step({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    return optimizer


@dataclass(frozen=True)
class Scheduled:
    """A server optimizer whose learning rate changes over the rounds.

    optimizer: Builds the server optimizer for parameters.
    schedule: Builds the scheduler, which steps once a round.
    """

    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    schedule: Schedule

    def __call__(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Returns the optimizer, with the rate of the first round."""
        return self.optimizer(parameters)

    def rate(self, round: int) -> float:
        """Returns the rate of a round. Rounds count from 0."""
        return self._rates(round)

    @cached_property
    def _rates(self) -> "Rates":
        return Rates(self.optimizer([torch.zeros(1)]).param_groups[0]["lr"], self.schedule, "server.schedule")


class Rates:
    """The learning rate of each round: a scheduler of torch that steps once a round."""

    def __init__(self, lr: float, schedule: Schedule, path: str) -> None:
        """Takes the rate that the scheduler starts from.

        lr: The rate.
        schedule: Builds the scheduler.
        path: The schedule's place in the configuration, for errors.
        """
        self._optimizer, self._path = torch.optim.SGD([torch.zeros(1)], lr=lr), path
        self._scheduler = tried(path, lambda: schedule(self._optimizer))
        self._rates, self._lock = [self._checked(0)], threading.Lock()

    def __call__(self, round: int) -> float:
        """Returns the rate of a round. The first round is number 0.

        Raises FedqError if the schedule has no such round, or gives it a rate below 0 or none that is finite.
        """
        with self._lock:
            while len(self._rates) <= round:
                tried(f"{self._path}, round {len(self._rates) + 1}", self._step)
                self._rates.append(self._checked(len(self._rates)))
            return self._rates[round]

    def _step(self) -> None:
        self._optimizer.step()
        self._scheduler.step()

    def _checked(self, round: int) -> float:
        rate = float(self._optimizer.param_groups[0]["lr"])
        if not 0 <= rate < math.inf:
            raise FedqError(
                f"{self._path} gives the rate {rate} in round {round + 1}: rates must be finite, at least 0"
            )
        return rate


def tried(path: str, function: Callable[[], Result]) -> Result:
    """Calls a function that tries an optimizer or a schedule. Raises FedqError, naming `path`, if the call fails."""
    try:
        return function()
    except FedqError:
        raise
    except Exception as error:  # an author's class may raise any error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise FedqError(f"{path}: {kind}{error}") from error
