"""What a round hands around: the task, what becomes of it, and the sums of that."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from fedq.data import Client
from fedq.learning.aggregation import PairwiseTree
from fedq.learning.failures import FailureKind
from fedq.learning.local_training import TrainingMetrics

PHASES = ("train", "encode", "decode", "aggregate")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds what its block takes to a phase's seconds."""
    started = perf_counter()
    try:
        yield
    finally:
        seconds[phase] += perf_counter() - started


class Contribution(NamedTuple):
    """What the server adds up over clients: weights, weighted updates and reports to adaptive stages.

    Updates are decoded as far as a sum can be taken (`StateDictEncoder.decode` with `partly`). With federated dropout
    they are decoded, and 0 where a client had nothing; and there are reports of each client's broadcast too.
    """

    weight: int
    update: dict[str, Tensor]
    reports: dict[str, Tensor]
    broadcast_reports: dict[str, Tensor]


@dataclass
class Record:
    """What is kept of each client of a round: why it failed if it did, bits, its update's weight and norm, and sums.

    `broadcast_bits` are those of what it was sent, `bits` its upload's. `norm` is that of the update as
    the server adds it up, None where nothing could be decoded.
    """

    client: int
    failure: FailureKind | None = None
    reason: str = ""
    broadcast_bits: int = 0
    bits: int = 0
    weight: int = 0
    norm: float | None = None
    training: TrainingMetrics = TrainingMetrics(0.0, 0, 0)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


class Task(NamedTuple):
    """A round's work as the clients get it.

    The serial number of the round, the broadcast, the norm guard's state; where the broadcast is the difference from
    what clients received last, a message of that, exact, for those that do not have it. With federated dropout the
    message is one of all that clients' own broadcasts are made from, and goes to none of them.
    """

    round: int
    message: bytes
    norm: float
    base: bytes = b""


class Share:
    """What a part of a cohort, or all of it, came to.

    The weights it received, the sums of contributions, a record a client, seconds of work.
    """

    def __init__(self, combine: Callable[[Contribution, Contribution], Contribution]) -> None:
        self.received: dict[str, Tensor] = {}
        self.sums: PairwiseTree[Contribution] = PairwiseTree(combine)
        self.records: dict[int, Record] = {}
        self.seconds = dict.fromkeys(PHASES, 0.0)


Gather = Callable[[Task, Sequence[Client]], Share]
"""Has a cohort do a task, wherever its clients run."""
