"""Asynchronous rounds (FedBuff, Nguyen 2022): a round may use answers of clients that an earlier round asked.

Time is the simulated time of `run.network`. A client's answer is made when the client is asked, and waits as bytes in
the state until its time has come. So a checkpoint holds the answers that are on their way.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from fedq.config_nodes import RunConfig
from fedq.errors import FedqError
from fedq.learning import Broadcast, ClientRecord, FedBuff, FederatedAveraging, ServerState, Summand
from fedq.learning.aggregation import PairwiseTree, one_thread
from fedq.learning.cohort import Asked
from fedq.learning.failures import FAILURES
from fedq.learning.metrics import counted, metrics_of
from fedq.learning.round import PHASES, Answer, Received, Registered, divide
from fedq.learning.server import scale_parameters
from fedq.simulation.loop import Clients, Step, cohort

_SPARE = 4
"""The number of clients that a step may ask for each answer that the step needs; above 1, because clients fail."""


_MESSAGES, _REPORT, _PARAMS, _WEIGHTS = "message/", "report", "params/", "weights/"


class Flight(NamedTuple):
    """An answer on its way.

    asked: The client with its answer.
    arrival: The simulated seconds since the start of the run at which the server has the answer.
    """

    asked: Asked
    arrival: float


def asynchronous_step(
    process: FederatedAveraging, run: RunConfig, population: int, clients: Clients, ranks: int
) -> Step | None:
    """Returns the step of a run whose algorithm is FedBuff, None for another algorithm.

    ranks: The number of processes that share the run. The other arguments are those of `Asynchronous`.

    Raises FedqError for options that an asynchronous run does not have.
    """
    algorithm = process.protocol.algorithm
    if not isinstance(algorithm, FedBuff):
        return None
    if ranks > 1:
        raise FedqError("algorithm=fedbuff runs in one process: start fedq without torchrun")
    return Asynchronous(process, algorithm, run, population, clients).step


class Asynchronous:
    """Steps of the server in the order in which answers arrive. One step of the server is a round."""

    def __init__(
        self, process: FederatedAveraging, algorithm: FedBuff, run: RunConfig, population: int, clients: Clients
    ) -> None:
        """Raises FedqError for options that an asynchronous run does not have.

        process: The algorithm's process, whose clock gives the time.
        algorithm: The algorithm of the process.
        run: The group `run` of the configuration.
        population: The number of all clients.
        clients: Returns clients by their numbers.
        """
        if process.clock is None:
            raise FedqError("algorithm=fedbuff needs a simulated time: choose run/network, such as run/network=mobile")
        if process.protocol.submodels:
            raise FedqError("run.submodel: algorithm=fedbuff needs clients that train the whole model")
        if process.clock.enough:
            raise FedqError("run.network.over_selection must be 0 with algorithm=fedbuff, which waits for no client")
        needed = algorithm.concurrency + run.clients_per_round
        if needed > population:
            raise FedqError(
                f"algorithm.concurrency={algorithm.concurrency} and run.clients_per_round={run.clients_per_round} need "
                f"{needed} clients: the dataset has {population}"
            )
        self._process, self._algorithm, self._run, self._clock = process, algorithm, run, process.clock
        self._population, self._clients = population, clients

    @one_thread()
    def step(self, state: ServerState) -> tuple[ServerState, dict[str, float]]:
        """Returns the state after one more step of the server, and the metrics of the answers that came before it.

        Bits count when an answer arrives. Raises FedqError if too few clients send a usable answer.
        """
        process, needed = self._process, self._run.clients_per_round
        state, seconds, work = state.to(process.device), dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        size = min(self._population, self._algorithm.concurrency + _SPARE * needed)
        candidates = cohort(self._run.seed, state.attempt, self._population, size).tolist()
        broadcast, reports = process.dispatch(state, candidates, seconds)
        started = perf_counter()
        received = process.cohort.received(broadcast)
        flights = _Flights(
            state.simulated_seconds,
            {client: _unpacked(client, packed, process.device) for client, packed in state.in_flight.items()},
            partial(self._earliest, broadcast),
            partial(self._asked, broadcast, received, work),
        )
        sums: PairwiseTree[Summand] = PairwiseTree(process.uplink.add)
        records: list[ClientRecord] = []
        answers: list[tuple[int, int]] = []  # a client, and the round of the broadcast that the client answers
        while len(answers) < needed:
            while candidates and len(flights) < self._algorithm.concurrency:
                flights.ask(candidates.pop(0))
            if not (flight := flights.next()):
                raise FedqError(
                    f"round {state.round + 1}: {len(answers)} of {len(records)} clients sent a usable update, "
                    f"the round needs {needed}, and no client is left to ask"
                )
            _, summand, record = process.cohort.open_one(state.norm, flight.asked, late=False)
            records.append(record)
            _add(work, record)
            if summand:
                attempt = flight.asked.received.attempt
                scale_parameters(process.protocol, summand.update, self._algorithm.scale(state.attempt - attempt))
                sums.add(len(answers), summand)
                answers.append((record.client, attempt))
        in_flight = {client: _packed(flight) for client, flight in flights.all().items()}
        divide(perf_counter() - started, work, seconds)
        seconds["simulated"] = flights.now - state.simulated_seconds
        sent = counted(state, records, process.uplink.guard, seconds["simulated"])
        total, usable = sums.result(), [record for record in records if not record.failure]
        assert total is not None  # for the type checker: there are answers
        caught_up = {client: attempt + 1 for client, attempt in answers}
        after = process.step(sent, total, usable, broadcast, reports, received.weights, caught_up, seconds)
        after = replace(after, in_flight=in_flight)
        staleness = sum(state.attempt - attempt for _, attempt in answers) / needed
        return after, metrics_of(process.protocol.task, state, after, records, seconds) | {"staleness": staleness}

    def _earliest(self, broadcast: Broadcast, client: int) -> float:
        """Returns the least seconds that an answer takes, before the answer is made."""
        messages = self._process.downlink.messages(broadcast, client)
        return self._clock.seconds(ClientRecord(client, broadcast_bits=8 * sum(map(len, messages))), 0)

    def _asked(
        self, broadcast: Broadcast, received: Received, work: dict[str, float], starts: Mapping[int, float]
    ) -> dict[int, Flight]:
        """Returns the flights of clients, given with the times at which they are asked. Adds the seconds to `work`."""
        flights = {}
        ask = partial(self._process.cohort.ask_one, broadcast, received)
        placed = list(enumerate(self._clients(broadcast.attempt, list(starts))))
        for asked in self._process.half.with_keyed_draws(lambda: list(self._process.map(ask, placed))):
            record, deadline = asked.record, self._clock.deadline
            _add(work, record)
            if asked.answer and record.arrival > deadline:
                record.failure, record.reason = "late", f"the answer took {record.arrival:.3g} simulated seconds"
                asked = asked._replace(answer=None)
            flights[record.client] = Flight(asked, starts[record.client] + min(record.arrival, deadline))
        return flights


class _Flights:
    """The clients that were asked and whose answers have not arrived.

    Clients train side by side, and as late as possible: when their answer could be the next one.

    now: The simulated time: when the last answer arrived.
    """

    def __init__(
        self,
        now: float,
        known: dict[int, Flight],
        earliest: Callable[[int], float],
        train: Callable[[Mapping[int, float]], dict[int, Flight]],
    ) -> None:
        """Starts with the flights of earlier steps.

        now: The simulated time.
        known: The flights of earlier steps, by client.
        earliest: Returns the least seconds that a client takes.
        train: Returns the flights of clients, given with the times at which they are asked.
        """
        self.now, self._known, self._earliest, self._train = now, known, earliest, train
        self._asked: dict[int, float] = {}  # clients that have not trained → the times at which they are asked

    def __len__(self) -> int:
        return len(self._known) + len(self._asked)

    def ask(self, client: int) -> None:
        """Asks a client, unless its last answer has not arrived."""
        if client not in self._known:
            self._asked[client] = self.now

    def next(self) -> Flight | None:
        """Returns the next answer and moves the time; None if no answer comes.

        If times are equal, the client with the lower number comes first.
        """
        soonest = min((start + self._earliest(client) for client, start in self._asked.items()), default=math.inf)
        if soonest <= min((flight.arrival for flight in self._known.values()), default=math.inf):
            self.all()
        client = min(self._known, key=lambda one: (self._known[one].arrival, one), default=None)
        if client is None or math.isinf(self._known[client].arrival):
            return None
        self.now = self._known[client].arrival
        return self._known.pop(client)

    def all(self) -> dict[int, Flight]:
        """Trains the clients that have not trained yet, and returns all flights by client."""
        self._known |= self._train(self._asked)
        self._asked = {}
        return self._known


def _add(work: dict[str, float], record: ClientRecord) -> None:
    """Moves the seconds of a record to `work`."""
    for phase in PHASES:
        work[phase] += record.seconds[phase]
        record.seconds[phase] = 0.0


def _packed(flight: Flight) -> dict[str, Tensor]:
    """Returns a flight as tensors, for the state, with only those received tensors that opening needs."""
    _, record, received, _, answer, registered = flight.asked
    failure = FAILURES.index(record.failure) if record.failure else -1
    numbers = (received.attempt, failure, record.broadcast_bits, record.bits, record.report_bits, *registered)
    packed = {
        "arrival": torch.tensor(flight.arrival, dtype=torch.float64),
        "numbers": torch.tensor(numbers),
        "reason": _as_tensor(record.reason.encode()),
    }
    packed |= {_PARAMS + name: value.cpu() for name, value in received.upload_params.items()}
    # an update of integers is their change from the received integers
    packed |= {_WEIGHTS + n: value.cpu() for n, value in received.weights.items() if not value.is_floating_point()}
    if answer:
        packed |= {f"{_MESSAGES}{i}": _as_tensor(message) for i, message in enumerate(answer.messages)}
        packed[_REPORT] = _as_tensor(answer.report)
    return packed


def _unpacked(client: int, packed: Mapping[str, Tensor], device: torch.device) -> Flight:
    """Returns the flight that `_packed` has packed, with the tensors that opening needs on `device`."""
    attempt, failure, broadcast_bits, bits, report_bits, examples, targets = packed["numbers"].tolist()
    record = ClientRecord(client, None if failure < 0 else FAILURES[failure], _as_bytes(packed["reason"]).decode())
    record.broadcast_bits, record.bits, record.report_bits = broadcast_bits, bits, report_bits
    weights, params = (
        {name: value.to(device) for name, value in _below(packed, prefix).items()} for prefix in (_WEIGHTS, _PARAMS)
    )
    received = Received(attempt, weights, {}, {}, params, {})
    messages = [_as_bytes(message) for message in _below(packed, _MESSAGES).values()]
    answer = Answer(messages, _as_bytes(packed[_REPORT]), {}) if _REPORT in packed else None
    asked = Asked(0, record, received, {}, answer, Registered(examples, targets))
    return Flight(asked, packed["arrival"].item())


def _below(packed: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in packed.items() if name.startswith(prefix)}


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
