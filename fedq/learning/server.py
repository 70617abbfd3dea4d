"""What the server holds, and how the cohort's mean update changes it."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedq.encoding.state_dict import ByTensor

ServerOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
"""Builds the server optimizer for the given parameters, as `functools.partial(torch.optim.Adam, lr=0.01)` does."""


@dataclass(frozen=True)
class ServerState:
    """All that one round hands to the next. Tensors are never changed in place.

    round: rounds done. weights: the model's state_dict. optimizer: the server optimizer's state_dict. broadcast and
    upload: states of the adaptive encoding stages. broadcasted_bits and aggregated_bits: sums over all rounds. repeats:
    cohorts of which too few answered. norm: the norm guard's estimate, 0 before the first. residual: what the broadcast
    has not told yet, for error feedback. received, lengths, holders: for a broadcast of differences from what was last
    received, the weights that a client has which followed all rounds, the bytes of each round's message, and of how
    many rounds a client has had them; clients that would rather be sent all of `received` are not among `holders`.
    """

    round: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    broadcast: ByTensor
    upload: ByTensor
    broadcasted_bits: int = 0
    aggregated_bits: int = 0
    repeats: int = 0
    norm: float = 0.0
    residual: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, Tensor] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    holders: dict[int, int] = field(default_factory=dict)

    @property
    def serial(self) -> int:
        """The round's number in keys and messages: no two cohorts share one."""
        return self.round + self.repeats

    def catching_up(self, client: int, full: int) -> int:
        """Returns how many bytes a client must be sent to hold `received`, of which an exact message has `full`.

        These are the messages that it missed, or all at once. Before the first round it holds the initial weights.
        """
        return min(full, sum(self.lengths[self.holders.get(client, 0) :]))

    def followed(self, received: dict[str, Tensor], length: int, full: int, clients: Iterable[int]) -> "ServerState":
        """Returns the state after this round's broadcast, of `length` bytes, which `clients` are known to have.

        `received` are the weights that it told, `full` the bytes of an exact message of them.
        """
        lengths = (*self.lengths, length)
        holders = self.holders | dict.fromkeys(clients, self.round)
        # who missed so much that all at once is shorter need not be remembered
        holders = {client: had for client, had in holders.items() if sum(lengths[had:]) < full}
        return replace(self, received=received, lengths=lengths, holders=holders)


def weighted(
    update: Mapping[str, Tensor], weights: Mapping[str, Tensor], weight: int, scale: float = 1.0
) -> dict[str, Tensor]:
    """Returns a client's update (see `client.update_of`) times its weight, ready to be added to others'.

    Works in place: `update` is used up. Floating tensors are also multiplied by `scale`, in float32 where they are
    narrower, which a sum would soon overflow. Integers and booleans become their change from `weights`, in int64, so
    that the sum is exact.
    """
    return {
        name: value.to(torch.promote_types(value.dtype, torch.float32)).mul_(weight * scale)
        if value.is_floating_point()
        else (value.to(torch.int64) - weights[name].to(torch.int64)) * weight
        for name, value in update.items()
    }


def server_step(
    build: ServerOptimizer,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    parameters: frozenset[str],
    total: Mapping[str, Tensor],
    weight: int | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the next weights and optimizer state, from the weighted sum of updates and the sum of their weights.

    That is one number, or a tensor each that broadcasts, where coordinates are not all of the same clients.
    The mean goes to the optimizer as a negative gradient of the `parameters` (Reddi 2021, algorithm 1). Other floating
    tensors (batch norm's running statistics) take the mean as it is; integers and booleans the mean to the nearest
    integer, in exact arithmetic. Works in place: `total` is used up.
    """
    share = weight if isinstance(weight, Mapping) else dict.fromkeys(weights, weight)
    leaves = {name: weights[name].clone().requires_grad_() for name in weights if name in parameters}
    optimizer = build(leaves.values())
    if state:
        optimizer.load_state_dict(deepcopy(dict(state)))
    for name, leaf in leaves.items():
        leaf.grad = total[name].div_(-share[name]).to(leaf.dtype)
    optimizer.step()
    after = {}
    for name, value in weights.items():
        if name in leaves:
            after[name] = leaves[name].detach()
        elif value.is_floating_point():
            after[name] = value + (total[name] / share[name]).to(value.dtype)
        else:
            nearest = torch.div(2 * total[name] + share[name], 2 * share[name], rounding_mode="floor")
            after[name] = (value.to(torch.int64) + nearest).to(value.dtype)
    return after, optimizer.state_dict()
