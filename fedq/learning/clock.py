"""The simulated time of a round: when answers arrive, and which answers the server waits for."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedq.learning.round import ClientRecord


@dataclass(frozen=True)
class Clock:
    """A clock that follows from counted bytes and modelled work, never from the clock of this machine.

    seconds: Returns the time from the first byte of the broadcast until the server has the client's answer. The
        arguments are the client's record, and the number of examples that the client trains on.
    deadline: The server leaves out answers that take more seconds.
    enough: The server leaves out answers after the first `enough`; None to wait for all clients.
    """

    seconds: Callable[[ClientRecord, int], float]
    deadline: float = math.inf
    enough: int | None = None

    def in_time(self, arrivals: Mapping[int, float]) -> set[int]:
        """Returns the places of the answers that the server takes.

        If times are equal, the first place in the cohort wins.

        arrivals: For each place in the cohort, the seconds until the answer is there; infinity if none comes.
        """
        order = sorted((time, place) for place, time in arrivals.items() if time <= self.deadline)
        return {place for _, place in order[: self.enough]}

    def end(self, records: Iterable[ClientRecord]) -> float:
        """Returns the seconds until the server stops waiting for a cohort.

        Without a deadline the server does not wait for clients that never answer.
        """
        arrivals = sorted((record.arrival, bool(record.bits)) for record in records)
        answers = [time for time, sent in arrivals if sent]
        enough = self.enough is not None and len(answers) >= self.enough
        waits = answers[: self.enough] if enough else [time for time, _ in arrivals]
        if math.isfinite(self.deadline):
            return min(waits[-1], self.deadline)
        return max((time for time in waits if math.isfinite(time)), default=0.0)
