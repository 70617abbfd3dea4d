"""Federated averaging with encoded messages: the algorithm, as two pure steps."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedq.data import Client, Examples
from fedq.encoding import EncodeError, Key, MessageError, StateDictEncoder, schema_of
from fedq.encoding.state_dict import ByTensor, flatten, unflatten
from fedq.errors import FedqError
from fedq.learning.aggregation import PairwiseTree
from fedq.learning.client import LocalTraining, TrainingMetrics, update_of
from fedq.learning.evaluation import Map, evaluate
from fedq.learning.server import ServerOptimizer, ServerState, server_step, weighted

log = logging.getLogger(__name__)

PHASES = ("train", "encode", "decode", "aggregate")
_UPLOAD = "upload/"  # before the names of the upload's params among what a broadcast attaches


class ClientFailure(Exception):
    """A client cannot take part in this round; says why."""


class Diverged(FedqError):
    """The server's weights hold NaN or infinity and cannot be sent; names the tensor."""


class TooFewClients(FedqError):
    """Fewer clients than required sent an update that could be used; says how many and why the first did not."""


class Contribution(NamedTuple):
    """What the server adds up over clients: weights, weighted updates and reports to adaptive stages."""

    weight: int
    update: dict[str, Tensor]
    reports: dict[str, Tensor]


@dataclass
class Record:
    """What is kept of each client of a round: why it failed if it did, its upload's bits, and sums to report."""

    client: int
    failure: str = ""
    bits: int = 0
    training: TrainingMetrics = TrainingMetrics(0.0, 0, 0)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Gives the calling thread one intra-op thread: floating sums depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FederatedAveraging:
    """Federated Averaging (McMahan 2016, algorithm 1) with a server optimizer (Reddi 2021) and encoders both ways.

    process = FederatedAveraging(model, client, server, broadcast, upload)
    state = process.initialize()
    state, metrics = process.next(state, clients)

    model: builds the network, as a class or a `functools.partial` of one. client: local training; where it is
    `structured`, the upload must be a projection on a linear subspace, else FedqError is raised. server: builds the
    server optimizer. broadcast, upload: what encodes each direction. seed: of every random draw. map: applies a
    function to many clients; a pool's `map` trains them side by side, with the same result. min_clients: with fewer
    usable updates `next` raises TooFewClients.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        client: LocalTraining,
        server: ServerOptimizer,
        broadcast: StateDictEncoder | None = None,
        upload: StateDictEncoder | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        map: Map = map,
        min_clients: int = 1,
    ) -> None:
        self.client, self.server = client, server
        self.broadcast, self.upload = broadcast or StateDictEncoder(), upload or StateDictEncoder()
        self.seed, self.device, self.map, self.min_clients = seed, torch.device(device), map, min_clients
        # Modules draw their first weights from torch's global generator: lend it the run's, then put it back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Key(seed).fold("model").integer())
            # Convolutions are about a tenth faster with channels last; the wire's order is unaffected.
            self._model = model().to(self.device).to(memory_format=torch.channels_last)
        weights = self._model.state_dict()
        self._schema = schema_of(weights)
        self._parameters = frozenset(name for name, _ in self._model.named_parameters())
        self._initial = {name: value.detach().clone() for name, value in weights.items()}
        self._local = threading.local()
        if client.structured:
            self._check_projection()

    def initialize(self) -> ServerState:
        """Returns the state before the first round."""
        return ServerState(
            round=0,
            weights=self._initial,
            optimizer={},
            broadcast=self.broadcast.initial_state(self._schema),
            upload=self.upload.initial_state(self._schema),
        )

    @_one_thread()
    def next(self, state: ServerState, clients: Iterable[Client]) -> tuple[ServerState, dict[str, float]]:
        """Runs one round with a cohort of clients; returns the state after it and the round's metrics.

        A client without examples, or whose update cannot be encoded or decoded, is left out with its weight, logged,
        and counted in `clients_failed`. Bits are 8 × the bytes of messages that were made, sent and decoded.
        `seconds/…` share out the round's wall time by the work done, whatever the number of workers.
        """
        clients = list(clients)
        seconds = dict.fromkeys(PHASES, 0.0)
        down, up = self.broadcast.params(self._schema, state.broadcast), self.upload.params(self._schema, state.upload)
        attached = flatten(down) | {_UPLOAD + path: value for path, value in flatten(up).items()}
        key = Key(self.seed, state.round)
        with _timed(seconds, "encode"):
            try:
                message, reported = self.broadcast.encode(state.weights, key, down, attached)
            except EncodeError as error:
                raise Diverged(f"round {state.round}: {error}: training diverged, try lower rates") from error
        with _timed(seconds, "decode"):
            # All clients decode the same bytes to the same weights and only read them: once is enough.
            received, brought = self.broadcast.decode(
                message, key, self._schema, attached=schema_of(attached), device=self.device
            )
        params = unflatten({path.removeprefix(_UPLOAD): t for path, t in brought.items() if path.startswith(_UPLOAD)})

        total, records = self._gather(clients, state, received, params, seconds)
        usable = [record for record in records if not record.failure]
        if total is None or len(usable) < self.min_clients:
            reasons = [f"; client {record.client}: {record.failure}" for record in records if record.failure]
            raise TooFewClients(
                f"round {state.round}: {len(usable)} of {len(clients)} clients sent a usable update, "
                f"at least {max(self.min_clients, 1)} must{''.join(reasons[:1])}"
            )
        with _timed(seconds, "aggregate"):
            weights, optimizer = server_step(
                self.server, state.optimizer, state.weights, self._parameters, total.update, total.weight
            )
            own_reports = self.broadcast.report(self._schema, flatten(reported))
            after = ServerState(
                round=state.round + 1,
                weights=weights,
                optimizer=optimizer,
                broadcast=self.broadcast.update_state(self._schema, state.broadcast, own_reports),
                upload=self.upload.update_state(self._schema, state.upload, total.reports),
                broadcasted_bits=state.broadcasted_bits + 8 * len(message) * len(clients),
                aggregated_bits=state.aggregated_bits + sum(record.bits for record in records),
            )
        seen = sum(record.training.seen for record in usable)
        return after, {
            "round": state.round,
            "train/loss": sum(record.training.loss for record in usable) / seen,
            "train/accuracy": sum(record.training.correct for record in usable) / seen,
            "broadcast_bits": after.broadcasted_bits - state.broadcasted_bits,
            "aggregated_bits": after.aggregated_bits - state.aggregated_bits,
            "cumulative_broadcasted_bits": after.broadcasted_bits,
            "cumulative_aggregated_bits": after.aggregated_bits,
            "clients": len(usable),
            "clients_failed": len(records) - len(usable),
            "uploads": sum(record.bits > 0 for record in records),
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
        }

    @_one_thread()
    def evaluate(self, state: ServerState, examples: Examples, batch_size: int = 500) -> dict[str, float]:
        """Returns the loss and accuracy of the server's weights on `examples`, as `evaluation.evaluate`."""
        self._model.load_state_dict(state.weights)
        return evaluate(self._model, examples, batch_size, self.map)

    def _gather(
        self,
        clients: list[Client],
        state: ServerState,
        received: Mapping[str, Tensor],
        params: ByTensor,
        seconds: dict[str, float],
    ) -> tuple[Contribution | None, list[Record]]:
        """Runs the cohort and adds up what it sends, as it comes; adds to `seconds` where the wall time went."""
        started, work = perf_counter(), dict.fromkeys(PHASES, 0.0)
        tree: PairwiseTree[Contribution] = PairwiseTree(self._add)
        records = []
        answers = self.map(lambda client: self._client(client, state, received, params), clients)
        for place, (contribution, record) in enumerate(answers):
            with _timed(work, "aggregate"):
                tree.add(place, contribution)
            records.append(record)
            if record.failure:
                log.warning("round %d: client %d is left out: %s", state.round, record.client, record.failure)
        total = tree.result()
        for phase in PHASES:
            work[phase] += sum(record.seconds[phase] for record in records)
        wall = perf_counter() - started
        for phase in PHASES:
            seconds[phase] += work[phase] * wall / max(sum(work.values()), 1e-9)
        return total, records

    def _client(
        self, client: Client, state: ServerState, received: Mapping[str, Tensor], params: ByTensor
    ) -> tuple[Contribution | None, Record]:
        """Does one client's part of a round, and the server's part for its message alone."""
        record = Record(client.number)
        key = Key(self.seed, state.round, client.number)
        model = self._worker_model()
        try:
            with _timed(record.seconds, "train"):
                examples = client.load()
                if not len(examples.y):
                    raise ClientFailure("it has no examples")
                project = partial(self._project, received, key, params) if self.client.structured else None
                training = self.client.train(model, received, examples, key.fold("train"), project)
                update = update_of(model.state_dict(), received)
            with _timed(record.seconds, "encode"):
                message, _ = self.upload.encode(update, key, params, report=True)
            record.bits, record.training = 8 * len(message), training

            with _timed(record.seconds, "decode"):
                decoded, reports = self.upload.decode(
                    message, key, self._schema, params, self.upload.update_spec(self._schema), self.device
                )
        except (ClientFailure, EncodeError, MessageError) as failure:
            record.failure = str(failure)
            return None, record
        with _timed(record.seconds, "aggregate"):
            weight = min(len(examples.y), self.client.max_examples or len(examples.y))
            update = weighted(decoded, state.weights, weight)
            return Contribution(weight, update, self.upload.report(self._schema, reports)), record

    def _project(
        self, weights: Mapping[str, Tensor], key: Key, params: ByTensor, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns what the server would decode of `gradients`; `weights` fill in for the schema's other tensors."""
        message, _ = self.upload.encode({**weights, **gradients}, key, params)
        decoded, _ = self.upload.decode(message, key, self._schema, params, device=self.device)
        return {name: decoded[name] for name in gradients}

    def _check_projection(self) -> None:
        """Raises FedqError unless what two steps of a client add up to can be sent without loss."""
        params = self.upload.params(self._schema, self.upload.initial_state(self._schema))
        project = partial(self._project, self._initial, Key(self.seed), params)
        steps = {name: self._initial[name] for name in self._parameters}
        first, second = project(steps), project({name: step.roll(1) for name, step in steps.items()})
        total = {name: first[name] + second[name] for name in steps}
        for name, again in project(total).items():
            if float((again - total[name]).norm()) > 1e-3 * float(total[name].norm()):
                raise FedqError(
                    f"client.structured: the upload of {name!r} is not a projection: it needs a chain such as "
                    "RandomMask or RandomSubspace without scale, and nothing lossy behind it"
                )

    def _add(self, left: Contribution, right: Contribution) -> Contribution:
        # The left operand is ours alone (fresh from `weighted`, or a sum): adding in place spares an allocation.
        return Contribution(
            left.weight + right.weight,
            {name: value.add_(right.update[name]) for name, value in left.update.items()},
            self.upload.combine(self._schema, left.reports, right.reports),
        )

    def _worker_model(self) -> nn.Module:
        """Returns the calling thread's own copy of the model."""
        if not hasattr(self._local, "model"):
            self._local.model = deepcopy(self._model)
        model: nn.Module = self._local.model
        return model


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = perf_counter()
    try:
        yield
    finally:
        seconds[phase] += perf_counter() - started
