"""Federated averaging with encoded messages: the algorithm, as two pure steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from fedq.data import Client, Examples
from fedq.encoding import EncodeError, Key, MessageError, StateDictEncoder
from fedq.encoding.numerics import is_finite
from fedq.errors import FedqError
from fedq.learning.aggregation import one_thread
from fedq.learning.algorithm import FedAvg
from fedq.learning.client import ClientHalf
from fedq.learning.client_state import ClientStore, InMemory
from fedq.learning.clock import Clock
from fedq.learning.cohort import Agree, Cohort, LocalClients, Network
from fedq.learning.error_feedback import Direction, compensate, residual_of
from fedq.learning.evaluation import Map, evaluate, evaluate_clients, evaluate_personal
from fedq.learning.failures import Diverged
from fedq.learning.guard import NormGuard
from fedq.learning.local_training import CLASSIFICATION, LocalTraining, Precision
from fedq.learning.metrics import counted, metrics_of, too_few
from fedq.learning.parts import copied, load
from fedq.learning.protocol import Protocol
from fedq.learning.round import PHASES, Broadcast, ClientRecord, CohortResult, Gather, Summand, divide, timed
from fedq.learning.server import Downlink, ServerOptimizer, Uplink, adapted, stepped
from fedq.learning.state import ServerState
from fedq.learning.submodel import FederatedDropout
from fedq.learning.task import Task

_EXACT, _FEDAVG = StateDictEncoder(), FedAvg()


class FederatedAveraging:
    """Federated Averaging (McMahan 2016, algorithm 1) with a server optimizer (Reddi 2021) and encoders both ways.

    process = FederatedAveraging(model, client, server, broadcast, upload)
    state = process.initialize()
    state, metrics = process.next(state, clients)
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        client: LocalTraining,
        server: ServerOptimizer,
        broadcast: Direction = _EXACT,
        upload: Direction = _EXACT,
        *,
        algorithm: FedAvg = _FEDAVG,
        task: Task = CLASSIFICATION,
        seed: int = 0,
        device: torch.device | str = "cpu",
        map: Map = map,
        network: Network | None = None,
        guard: NormGuard | None = None,
        min_clients: int = 1,
        precision: Precision = "float32",
        store: ClientStore | None = None,
        submodel: FederatedDropout | None = None,
        population: int | None = None,
        clock: Callable[[Protocol], Clock] | None = None,
    ) -> None:
        """Binds both halves to the model. Raises FedqError for parts that do not fit together.

        model: Builds the network: a class, or a `functools.partial` of one.
        client: Local training.
        server: Builds the server optimizer.
        broadcast: The encoder of the server's messages.
        upload: The encoder of clients' messages.
        algorithm: The federated algorithm; Federated Averaging by default.
        task: The loss and the metrics; classification by default.
        seed: The seed of every random draw.
        device: Where the model is trained and averaged.
        map: Applies a function to many clients; a pool's `map` trains clients side by side, with the same result.
        network: Passes on, changes or loses the bytes of clients' messages.
        guard: Clips or drops updates with an unusual norm.
        min_clients: The number of usable updates below which `next` raises TooFewClients.
        precision: The precision of forward and backward passes; weights and optimizers keep the model's dtype.
        store: Where clients keep state between their rounds; in memory by default.
        submodel: Federated dropout: each client trains a part of the model.
        population: The number of all clients, which some algorithms need; by default the size of a cohort.
        clock: Builds the clock, which gives rounds a simulated time and leaves out late answers; None for no clock.
        """
        self.min_clients, self.population = min_clients, population
        self.device = torch.device(device)
        self.protocol = protocol = Protocol(
            model, client, broadcast, upload, algorithm, task, submodel, seed, self.device
        )
        self.server, self.map, self.precision = server, map, precision
        self.clock = clock(protocol) if clock else None
        self.store = InMemory() if store is None else store
        self.downlink, self.uplink = Downlink(protocol), Uplink(protocol, guard)
        self.half = ClientHalf(protocol, precision)
        clients = LocalClients(self.half, self.store, network)
        self.cohort = Cohort(protocol, self.downlink, self.uplink, clients.ask, map, self.clock)

    def initialize(self) -> ServerState:
        """Returns the state before the first round."""
        groups = self.protocol.groups.values()
        return ServerState(
            round=0,
            weights=self.protocol.initial,
            optimizer={},
            broadcast={k: v for group in groups for k, v in group.broadcast.adaptation.initial_state().items()},
            upload={k: v for group in groups for k, v in group.upload.adaptation.initial_state().items()},
            groups=self.protocol.initial_groups,
        )

    @one_thread()
    def next(
        self, state: ServerState, clients: Iterable[Client], gather: Gather | None = None
    ) -> tuple[ServerState, dict[str, float]]:
        """Runs one round with a cohort of clients; returns the state after it and the round's metrics.

        state: The state before the round.
        clients: The cohort; each client has another number.
        gather: Runs `contribute` for the cohort, in one process or several; by default in this process.

        A client whose answer cannot be used is left out with its weight, logged, and counted in `clients_failed` and by
        kind. Bits are 8 × the bytes of messages that were made, sent and decoded. `seconds/…` divide the round's wall
        time among its phases, in proportion to the work of all workers.

        Raises TooFewClients if fewer than `min_clients` answers can be used, Diverged if the weights cannot be sent.
        """
        clients, state, seconds = list(clients), state.to(self.device), dict.fromkeys(PHASES, 0.0)
        if len({client.number for client in clients}) < len(clients):
            raise FedqError("two clients of a cohort have the same number: they would draw the same random numbers")
        broadcast, reports = self.dispatch(state, [client.number for client in clients], seconds)
        started = perf_counter()
        result = gather(broadcast, clients) if gather else self.contribute(broadcast, enumerate(clients))
        total, records = result.sums.result(), [result.records[place] for place in range(len(clients))]
        divide(perf_counter() - started, result.seconds, seconds)
        usable = [record for record in records if not record.failure]
        if self.clock:
            seconds["simulated"] = self.clock.end(records)
        sent = counted(state, records, self.uplink.guard, seconds.get("simulated", 0.0))
        if total is None or len(usable) < self.min_clients:
            raise too_few(sent, records, seconds, self.min_clients, self.protocol.follows)
        caught_up = {record.client: state.round + 1 for record in usable}
        after = self.step(sent, total, usable, broadcast, reports, result.received, caught_up, seconds)
        return after, metrics_of(self.protocol.task, state, after, records, seconds)

    def dispatch(
        self, state: ServerState, clients: Sequence[int], seconds: dict[str, float]
    ) -> tuple[Broadcast, dict[str, Tensor]]:
        """Returns the broadcast of a state to clients, and its reports to the broadcast's adaptive parts.

        seconds: The seconds of each phase; the method adds its own.

        Raises Diverged if the weights cannot be sent.
        """
        if self.protocol.kept_schema:
            self.store.begin(state.attempt)
        with timed(seconds, "encode"):
            try:
                return self.downlink.open(state, clients)
            except EncodeError as error:
                if all(map(is_finite, [*state.weights.values(), *state.groups.values()])):
                    raise  # the encoder does not take such tensors
                raise Diverged(f"round {state.round + 1}: {error}: training diverged, try lower rates") from error

    def step(
        self,
        state: ServerState,
        total: Summand,
        usable: Sequence[ClientRecord],
        broadcast: Broadcast,
        reports: Mapping[str, Tensor],
        received: dict[str, Tensor],
        caught_up: Mapping[int, int],
        seconds: dict[str, float],
    ) -> ServerState:
        """Returns the state after a step of the server.

        state: The state before the step, with the bits of the answers counted.
        total: The sum of the answers.
        usable: The records of the clients whose answers were added up.
        broadcast: The last broadcast.
        reports: The reports of the broadcast's encoding.
        received: The weights that the broadcast decodes to.
        caught_up: Client → the number of rounds whose broadcasts the client has received.
        seconds: The seconds of each phase; the method adds its own.

        Raises Diverged if the sum overflows.
        """
        with timed(seconds, "decode"):
            try:
                sums = self.uplink.close(total, state)
            except MessageError as error:  # a sum may overflow
                raise Diverged(f"round {state.round + 1}: {error}: training diverged, try lower rates") from error
        with timed(seconds, "aggregate"):
            before = replace(state, round=state.round + 1)
            after = stepped(self.protocol, self.server, before, sums, total.weight, usable, self.population)
            if any(group.adaptive for group in self.protocol.groups.values()):
                after = adapted(self.protocol, after, {**reports, **total.broadcast_reports}, total.reports)
            if self.protocol.broadcast_feedback:
                compensated = compensate(state.weights, state.residual)
                after = replace(after, residual=residual_of(self.protocol.to_all, compensated, received))
            if self.protocol.follows:
                after = after.after_broadcast(received, broadcast.messages[0], len(broadcast.all_at_once), caught_up)
        return after

    def contribute(
        self, broadcast: Broadcast, clients: Iterable[tuple[int, Client]], agree: Agree = dict
    ) -> CohortResult:
        """Returns the result of a part of the cohort; see `Cohort.contribute`.

        If a client's model is the first to draw, all these clients train again, with keyed draws.
        """
        clients = list(clients)
        return self.half.with_keyed_draws(lambda: self.cohort.contribute(broadcast, clients, agree))

    @one_thread()
    def evaluate(
        self, state: ServerState, examples: Examples, batch_size: int = 50, clients: Iterable[tuple[int, Examples]] = ()
    ) -> dict[str, float]:
        """Returns the task's metrics of the server's weights on `examples`; see `evaluation.evaluate`.

        clients: With personal tensors, numbers and examples of clients. A metric is the mean over those clients that
            have the metric, each with its own tensors. Clients without a target that counts are left out.
        """
        how = (batch_size, self.map, self.precision, self.protocol.task)
        models = partial(self._model, state)
        personal = evaluate_personal(models, clients, *how) if self.protocol.parts.personal else {}
        return personal or evaluate(models(), examples, *how)

    @one_thread()
    def evaluate_clients(self, state: ServerState, clients: Iterable[Client], batch_size: int = 50) -> dict[str, float]:
        """Returns mean, median and worst tenth over clients; see `evaluation.evaluate_clients`."""
        how = (batch_size, self.map, self.precision, self.protocol.task)
        return evaluate_clients(partial(self._model, state), clients, *how)

    def _model(self, state: ServerState, client: int | None = None) -> nn.Module:
        """Returns a model with the server's weights, and with a client's personal tensors, if any.

        The model is a copy, because evaluation may write to buffers. Frozen parameters are not copied.
        """
        protocol, weights = self.protocol, state.weights
        if client is not None and protocol.parts.personal:
            kept = self.store.load(client, state.attempt, protocol.kept_schema)
            weights = protocol.start(weights, kept, Key(protocol.seed, state.attempt, client))
        model = copied(protocol.model)
        load(model, protocol.without_shared(weights))
        return model
