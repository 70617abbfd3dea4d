"""What the server holds between rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedq.errors import FedqError


@dataclass(frozen=True, repr=False)
class ServerState:
    """The server's state between two rounds. Tensors are never changed in place.

    round: The number of rounds done.
    weights: The model's state_dict.
    optimizer: The server optimizer's state_dict.
    broadcast: The state of the broadcast's adaptive parts, flat.
    upload: The state of the upload's adaptive parts, flat.
    broadcasted_bits: The bits sent to clients, over all rounds.
    aggregated_bits: The bits of updates that clients sent, over all rounds.
    reported_bits: The bits of reports beside the updates, over all rounds.
    repeats: The number of cohorts that were too small and were repeated.
    simulated_seconds: The simulated time of all rounds; 0 without a clock.
    in_flight: In asynchronous rounds, the clients whose answers are on their way; see `simulation.asynchronous`.
    norm: The norm guard's estimate; 0 before the first round.
    residual: The broadcast's residual, for error feedback.
    groups: The server's tensors of the algorithm's groups.
    received: With reference=last, the weights of a client that received every broadcast; empty before the first.
    kept: With reference=last, the last broadcasts, oldest first, as uint8 tensors.
    last_received: With reference=last, the rounds after which each client was up to date.
    base: In a checkpoint, the SHA-256 of the frozen tensors, which `weights` then lacks; see `Protocol.without_base`.
    """

    round: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    broadcast: dict[str, Tensor]
    upload: dict[str, Tensor]
    broadcasted_bits: int = 0
    aggregated_bits: int = 0
    reported_bits: int = 0
    repeats: int = 0
    norm: float = 0.0
    residual: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, Tensor] = field(default_factory=dict)
    kept: tuple[Tensor, ...] = ()
    last_received: dict[int, int] = field(default_factory=dict)
    simulated_seconds: float = 0.0
    in_flight: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    base: str = ""

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> "ServerState":
        """Returns the state from its saved fields, also from those of commit 1c20104.

        Raises FedqError for a saved state that lacks what a round needs, TypeError for other fields.
        """
        if saved.pop("lengths", ()) or saved.pop("holders", {}):
            raise FedqError(
                "an earlier version saved it without the broadcasts that reference=last needs: start a new run"
            )
        for name in ("broadcast", "upload"):  # once nested: tensor, place, name
            for tensor, places in list(saved[name].items()):
                if isinstance(places, dict):
                    if not all(isinstance(place, int) for place in places):
                        raise TypeError(f"{name} is of another type")
                    del saved[name][tensor]
                    for place, values in places.items():
                        saved[name] |= {f"{tensor}/{place}/{own}": value for own, value in values.items()}
        return cls(**saved)

    def __repr__(self) -> str:
        """Returns the counters; tensors would fill pages."""
        return f"ServerState(round={self.round}, repeats={self.repeats}, {len(self.weights)} tensors)"

    @property
    def attempt(self) -> int:
        """The round's number in keys and messages. No two cohorts share one."""
        return self.round + self.repeats

    def to(self, device: torch.device) -> "ServerState":
        """Returns the state with all tensors that a round computes with on `device`."""
        weights, residual, groups, received = (
            {name: value.to(device) for name, value in tensors.items()}
            for tensors in (self.weights, self.residual, self.groups, self.received)
        )
        return replace(self, weights=weights, residual=residual, groups=groups, received=received)

    def missed(self, client: int) -> int:
        """Returns how many of the kept broadcasts a client lacks; −1 if it lacks more than are kept."""
        behind = self.round - self.last_received.get(client, 0)
        return behind if behind <= len(self.kept) else -1

    def after_broadcast(
        self, received: dict[str, Tensor], message: bytes, limit: int, caught_up: Mapping[int, int]
    ) -> "ServerState":
        """Returns the state with the round's broadcast kept; `round` counts the round already.

        received: The weights that the broadcast decodes to.
        message: The bytes of the broadcast.
        limit: The bytes of an exact message. The oldest broadcasts are dropped until all together are shorter.
        caught_up: Client → the number of rounds whose broadcasts the client has received.
        """
        kept = [*self.kept, torch.frombuffer(bytearray(message), dtype=torch.uint8)]
        while sum(map(len, kept)) >= limit:
            kept.pop(0)
        last = {**self.last_received, **caught_up}
        last = {client: rounds for client, rounds in last.items() if self.round - rounds <= len(kept)}
        return replace(self, received=received, kept=tuple(kept), last_received=last)
