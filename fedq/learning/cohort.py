"""A cohort: the server's half around each client, and clients on this machine."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from fedq.data import Client
from fedq.encoding import EncodeError, Key, MessageError
from fedq.learning.aggregation import PairwiseTree, one_thread
from fedq.learning.client import ClientHalf
from fedq.learning.client_state import ClientStore
from fedq.learning.clock import Clock
from fedq.learning.evaluation import Map
from fedq.learning.failures import ClientFailure, OtherBase
from fedq.learning.local_training import loaded
from fedq.learning.protocol import Protocol
from fedq.learning.round import (
    PHASES,
    Answer,
    Broadcast,
    ClientRecord,
    CohortResult,
    Received,
    Registered,
    Summand,
    timed,
)
from fedq.learning.server import Downlink, Uplink

log = logging.getLogger(__name__)

_WINDOW = 16  # clients that are sorted by size at a time; at most as many updates wait for their neighbours

Network = Callable[[bytes, Key], bytes]
"""From the bytes of a client's message or report, and its key, to what the server receives.

Raises ClientFailure if nothing arrives.
"""

Ask = Callable[[Client, list[bytes], Received, ClientRecord], tuple[Answer, Registered]]
"""Sends messages to a client. Returns the answer that the server receives, and the registered numbers of the client.
The simulation also passes the decoded messages, so that a cohort decodes the same bytes once. The record gets the
number of bits that the client sends, and the client's seconds. Raises ClientFailure if no usable answer comes.
"""


Agree = Callable[[Mapping[int, float]], Mapping[int, float]]
"""Returns the arrivals of a whole cohort, by place, from the arrivals of the part of this process."""


class Asked(NamedTuple):
    """A client that was asked.

    place: The client's place in the cohort.
    record: What the server records about the client.
    received: The client's decoded broadcast.
    reports: With federated dropout, the reports of the encoding of the client's own message.
    answer: The bytes that the server received; None if no answer came.
    registered: The registered numbers of the client.
    """

    place: int
    record: ClientRecord
    received: Received
    reports: dict[str, Tensor]
    answer: Answer | None
    registered: Registered


@dataclass(frozen=True)
class Cohort:
    """Sends a broadcast to clients and adds up their answers. Each client sees bytes only.

    protocol: What both halves agree on.
    downlink: The half of the server that sends.
    uplink: The half of the server that receives.
    ask: Reaches a client, on this machine or elsewhere.
    map: Applies a function to many clients.
    clock: The simulated time; None for none.
    """

    protocol: Protocol
    downlink: Downlink
    uplink: Uplink
    ask: Ask
    map: Map
    clock: Clock | None = None

    @one_thread()
    def contribute(
        self, broadcast: Broadcast, clients: Iterable[tuple[int, Client]], agree: Agree = dict
    ) -> CohortResult:
        """Returns the result of a part of the cohort; `clients` holds each client with its place in the cohort.

        agree: Returns the arrivals of the whole cohort from the arrivals of the part.
        """
        result = CohortResult(PairwiseTree(self.uplink.add))
        with timed(result.seconds, "decode"):
            received = self.received(broadcast)
            result.received = received.weights
        ask, opened = partial(self.ask_one, broadcast, received), partial(self.open_one, broadcast.norm)
        if self.clock and self.clock.enough:
            # answers wait as bytes until the arrivals of all are known
            asked = list(self.map(ask, _longest_first(clients)))
            arrivals = {one.place: one.record.arrival if one.answer else math.inf for one in asked}
            in_time = self.clock.in_time(agree(arrivals))
            results = self.map(lambda one: opened(one, one.place not in in_time), asked)
        else:
            deadline = self.clock.deadline if self.clock else math.inf

            def one_client(placed: tuple[int, Client]) -> tuple[int, Summand | None, ClientRecord]:
                asked = ask(placed)
                return opened(asked, asked.record.arrival > deadline)

            results = self.map(one_client, _longest_first(clients))
        for place, summand, record in results:
            with timed(result.seconds, "aggregate"):
                result.sums.add(place, summand)
            result.records[place] = record
            for phase in PHASES:
                result.seconds[phase] += record.seconds[phase]
        return result

    def received(self, broadcast: Broadcast) -> Received:
        """Returns the decoded broadcast of a client that has received all earlier broadcasts.

        All clients decode the same bytes to the same weights, and do not change the weights. So one decoding is enough.
        """
        at_once = [broadcast.all_at_once] if broadcast.all_at_once else []
        return self.protocol.receive([*at_once, *broadcast.messages])

    def ask_one(self, broadcast: Broadcast, received: Received, placed: tuple[int, Client]) -> Asked:
        """Sends the messages to a client and takes its answer. If no answer comes, the record holds the reason."""
        place, client = placed
        record, answer, registered = ClientRecord(client.number), None, Registered(0, 0)
        reports: dict[str, Tensor] = {}
        with _recorded(record):
            messages = self.downlink.messages(broadcast, client.number)
            if self.protocol.submodels:
                with timed(record.seconds, "encode"):
                    message, reports = self.downlink.part(received, client.number)
                with timed(record.seconds, "decode"):
                    messages, received = [message], self.protocol.receive([message], client=client.number)
            record.broadcast_bits = 8 * sum(map(len, messages))
            try:
                answer, registered = self.ask(client, messages, received, record)
            except OtherBase:
                messages = self.downlink.with_base(broadcast, messages)
                record.broadcast_bits += 8 * sum(map(len, messages))
                answer, registered = self.ask(client, messages, received, record)
        if self.clock and record.failure not in ("silent", "late"):
            record.arrival = self.clock.seconds(record, registered.examples)
        return Asked(place, record, received, reports, answer, registered)

    def open_one(self, norm: float, asked: Asked, late: bool) -> tuple[int, Summand | None, ClientRecord]:
        """Reads a client's answer. If the answer cannot be used, the record holds the reason.

        norm: The norm guard's estimate.
        asked: The client with its answer.
        late: Whether the answer comes too late.
        """
        place, record, received, reports, answer, registered = asked
        with _recorded(record):
            if answer and late:
                raise ClientFailure("late", f"the answer took {record.arrival:.3g} simulated seconds")
            if answer:
                summand = self.uplink.open(answer, received, registered, norm, record)
                return place, summand._replace(broadcast_reports=reports), record
        return place, None, record


@contextmanager
def _recorded(record: ClientRecord) -> Iterator[None]:
    """Writes the failure of a client to its record."""
    try:
        yield
    except ClientFailure as failure:
        record.failure, record.reason = failure.kind, str(failure)
        if failure.__cause__:
            log.debug("client %d:", record.client, exc_info=failure.__cause__)
    except (EncodeError, MessageError) as error:
        record.failure = "unable" if isinstance(error, EncodeError) else "refused"
        record.reason = str(error)
    if record.failure in ("silent", "unable"):
        record.bits = record.report_bits = 0  # nothing was sent


@dataclass(frozen=True)
class LocalClients:
    """Clients on this machine.

    half: The clients' half.
    store: What clients keep between their rounds.
    network: What happens to the bytes of answers on their way; None if they arrive as sent.
    """

    half: ClientHalf
    store: ClientStore
    network: Network | None

    def ask(
        self, client: Client, messages: list[bytes], received: Received, record: ClientRecord
    ) -> tuple[Answer, Registered]:
        """Trains a client and returns its answer. `messages` are not decoded again: `received` holds their tensors.

        A client that sends nothing keeps its earlier state. Every other client commits its new state, because a client
        does not know whether its answer arrives.
        """
        protocol, seconds, sent = self.half.protocol, record.seconds, False
        with timed(seconds, "train"):
            examples = loaded(client.number, client.load, protocol.device)
        with timed(seconds, "encode"):
            schema = protocol.kept_schema
            kept = self.store.load(client.number, received.attempt, schema) if schema else {}
        answer = self.half.answer(received, client.number, examples, kept, seconds)
        record.bits, record.report_bits = 8 * sum(map(len, answer.messages)), 8 * len(answer.report)
        try:
            if self.network:
                key = Key(protocol.seed, received.attempt, client.number)
                *messages, report = (self.network(message, key) for message in (*answer.messages, answer.report))
                answer = answer._replace(messages=messages, report=report)
            sent = True
        except ClientFailure as failure:
            sent = failure.kind != "silent"
            raise
        finally:
            if sent and schema:
                with timed(seconds, "encode"):
                    self.store.commit(client.number, received.attempt, answer.to_keep)
        return answer, protocol.registered(examples, Key(protocol.seed, received.attempt, client.number))


def _longest_first(clients: Iterable[tuple[int, Client]]) -> Iterator[tuple[int, Client]]:
    """Yields the clients, in each window of 16 those with the most examples first: no worker then idles at the end.

    A window, because each update waits in memory until its neighbours in the cohort arrive.
    """
    clients = iter(clients)
    while window := list(islice(clients, _WINDOW)):
        yield from sorted(window, key=lambda placed: -placed[1].examples)
