"""What clients keep between their rounds for error feedback."""

import threading
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from fedq.encoding.state_dict import Schema


class ResidualStore(Protocol):
    """Keeps each client's residual. Called from several threads, of one client from one at a time."""

    def load(self, client: int, serial: int, schema: Schema) -> Mapping[str, Tensor]:
        """Returns the residual of `schema` that the client's last round before number `serial` left, empty if none."""

    def save(self, client: int, serial: int, residual: Mapping[str, Tensor]) -> None:
        """Keeps a residual, exact and on the CPU, which the round of number `serial` leaves."""


class InMemory:
    """Keeps each client's last two residuals: a round can be given again, and one before the last cannot.

    Call `begin` before each round.
    """

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, Mapping[str, Tensor]]] = {}
        self._lock = threading.Lock()

    def begin(self, serial: int) -> None:
        """Forgets what rounds from number `serial` on left: they are given again, or another training begins."""
        self._kept = {c: {s: r for s, r in own.items() if s < serial} for c, own in self._kept.items()}

    def load(self, client: int, serial: int, schema: Schema) -> Mapping[str, Tensor]:
        """As ResidualStore.load."""
        with self._lock:
            own = self._kept.get(client, {})
            return own[max(before)] if (before := [s for s in own if s < serial]) else {}

    def save(self, client: int, serial: int, residual: Mapping[str, Tensor]) -> None:
        """As ResidualStore.save."""
        with self._lock:
            own = self._kept.get(client, {})
            last = max((s for s in own if s < serial), default=None)
            self._kept[client] = {serial: residual} if last is None else {last: own[last], serial: residual}
