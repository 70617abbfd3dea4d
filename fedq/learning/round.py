"""The values of a round: broadcast, answers, and the sums over a cohort."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from fedq.data import Client
from fedq.encoding.schema import Tensors
from fedq.learning.aggregation import PairwiseTree
from fedq.learning.failures import FailureKind
from fedq.learning.local_training import TrainingMetrics

PHASES = ("train", "encode", "decode", "aggregate")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the wall time of the `with` block to the seconds of `phase`."""
    started = perf_counter()
    try:
        yield
    finally:
        seconds[phase] += perf_counter() - started


def divide(wall: float, work: Mapping[str, float], seconds: dict[str, float]) -> None:
    """Adds a wall time to the `seconds` of the phases, in proportion to the work of all workers."""
    for phase in PHASES:
        seconds[phase] += wall * work[phase] / max(sum(work.values()), 1e-9)


class Broadcast(NamedTuple):
    """What the server sends in a round, with the values that it needs to read the answers.

    attempt: The round's number in keys and messages; no two cohorts share one.
    messages: The bytes for all clients, one message a group. With federated dropout they are not sent. The server
        decodes them, and cuts each client's own message from the result.
    norm: The norm guard's estimate.
    all_at_once: With reference=last, an exact message of the reference; empty otherwise.
    kept: With reference=last, the earlier broadcasts that are still sent, oldest first.
    missed: How many of `kept` each client of the cohort lacks; −1 if it lacks more.
    """

    attempt: int
    messages: list[bytes]
    norm: float = 0.0
    all_at_once: bytes = b""
    kept: Sequence[bytes] = ()
    missed: Mapping[int, int] = MappingProxyType({})


class Received(NamedTuple):
    """What a client decodes from a broadcast.

    attempt: The round's number in keys and messages.
    weights: The model's weights, or those of the client's sub-model.
    groups: The tensors of the algorithm's other groups.
    params: The params of adaptive parts, as attached to the messages.
    upload_params: The params of the upload's adaptive parts, under the names that the upload's codecs use.
    reference: With reference=last, the weights that the broadcast builds on. The client keeps them beside `weights`.
    """

    attempt: int
    weights: dict[str, Tensor]
    groups: dict[str, Tensor]
    params: dict[str, Tensor]
    upload_params: dict[str, Tensor]
    reference: Tensors


class Answer(NamedTuple):
    """What a client sends back, and what its store commits when the answer is sent.

    messages: The bytes of the update, one message a group.
    report: The bytes of the training's metrics.
    to_keep: The tensors for the client's store, on the CPU.
    """

    messages: list[bytes]
    report: bytes
    to_keep: dict[str, Tensor]


class Registered(NamedTuple):
    """Numbers of a client that the server registers in a round. Only examples that the client uses count.

    examples: The number of examples.
    targets: The number of targets of these examples that count for the task.
    """

    examples: int
    targets: int


class Summand(NamedTuple):
    """What the server adds up over clients.

    weight: The weight in the mean of weights.
    update: Weighted updates of all groups, decoded as far as a sum allows. With federated dropout they are decoded, and
        0 where the client's sub-model has nothing.
    reports: Reports to the adaptive parts of uploads.
    broadcast_reports: Reports to the adaptive parts of broadcasts; with federated dropout only.
    sums: Other numbers that the algorithm adds up.
    """

    weight: int
    update: dict[str, Tensor]
    reports: dict[str, Tensor]
    broadcast_reports: dict[str, Tensor]
    sums: dict[str, float]


@dataclass
class ClientRecord:
    """What the server records about one client of a round.

    client: The client's number.
    failure: Why the client is left out; None if its update is used.
    reason: The failure in a sentence.
    broadcast_bits: The bits sent to the client.
    bits: The bits of the client's update.
    report_bits: The bits of the client's report.
    weight: The client's weight in the mean.
    norm: The Euclidean norm of the update that the server adds up; None without a guard or a decoded update.
    training: What the client reports of its training.
    arrival: The simulated seconds until the server has the answer; infinity if no answer comes.
    seconds: The seconds of each phase.
    """

    client: int
    failure: FailureKind | None = None
    reason: str = ""
    broadcast_bits: int = 0
    bits: int = 0
    report_bits: int = 0
    weight: int = 0
    norm: float | None = None
    training: TrainingMetrics = TrainingMetrics({}, 0, 0)
    arrival: float = math.inf
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


@dataclass
class CohortResult:
    """The result of a cohort, or of a part of one.

    sums: The sums over the clients.
    received: The weights that the cohort decoded; empty if each client has its own.
    records: A record for each client, by its place in the cohort.
    seconds: The seconds of each phase, over all workers.
    """

    sums: PairwiseTree[Summand]
    received: dict[str, Tensor] = field(default_factory=dict)
    records: dict[int, ClientRecord] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


Gather = Callable[[Broadcast, Sequence[Client]], CohortResult]
"""Sends a broadcast to a cohort and returns its result, from one process or several."""
