"""State that clients keep between their rounds: residuals of error feedback, control variates."""

import threading
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from fedq.encoding.schema import Schema


class ClientStore(Protocol):
    """Keeps each client's tensors. Threads may call it for different clients at the same time."""

    def begin(self, attempt: int) -> None:
        """Drops what rounds from number `attempt` on committed. Called before a round, which may be a repetition."""

    def load(self, client: int, attempt: int, schema: Schema) -> Mapping[str, Tensor]:
        """Returns the tensors of `schema` that the client last committed before `attempt`; empty if there are none."""

    def commit(self, client: int, attempt: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors of the client's round `attempt`: finite, on the CPU, and never changed again."""


class InMemory:
    """Keeps each client's last two versions in memory, so that the last round can be repeated."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, Mapping[str, Tensor]]] = {}
        self._lock = threading.Lock()

    def begin(self, attempt: int) -> None:
        """Forgets what rounds from number `attempt` on committed."""
        self._kept = {c: {a: t for a, t in own.items() if a < attempt} for c, own in self._kept.items()}

    def load(self, client: int, attempt: int, schema: Schema) -> Mapping[str, Tensor]:
        """Returns what the client's last round before number `attempt` committed."""
        with self._lock:
            own = self._kept.get(client, {})
            return own[max(before)] if (before := [a for a in own if a < attempt]) else {}

    def commit(self, client: int, attempt: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps what the client's round of number `attempt` leaves."""
        with self._lock:
            own = self._kept.get(client, {})
            last = max((a for a in own if a < attempt), default=None)
            self._kept[client] = {attempt: tensors} if last is None else {last: own[last], attempt: tensors}
