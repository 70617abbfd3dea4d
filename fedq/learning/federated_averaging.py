"""Federated averaging with encoded messages: the algorithm, as two pure steps."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor, nn

from fedq.data import Client, Examples
from fedq.encoding import EncodeError, Key, MessageError, StateDictEncoder, schema_of
from fedq.encoding.encoder import is_finite
from fedq.encoding.spec import Tensors
from fedq.encoding.state_dict import ByTensor, flatten, unflatten
from fedq.errors import FedqError
from fedq.learning.client import LocalTraining, Precision, update_of
from fedq.learning.dropout import FederatedDropout, SubModels, Units
from fedq.learning.evaluation import Map, evaluate
from fedq.learning.failures import FAILURES, ClientFailure
from fedq.learning.guard import NormGuard, norm
from fedq.learning.residuals import InMemory, ResidualStore
from fedq.learning.round import PHASES, Contribution, Gather, Record, Share, Task
from fedq.learning.server import ServerOptimizer, ServerState, server_step, weighted

log = logging.getLogger(__name__)

_UPLOAD = "upload/"  # before the names of the upload's params among what a broadcast attaches
_EXACT = StateDictEncoder()
_WINDOW = 16  # clients that are put in order of size at a time: so many updates may wait for their neighbours'


class Diverged(FedqError):
    """The server's weights hold NaN or infinity and cannot be sent; names the tensor."""


class TooFewClients(FedqError):
    """Fewer clients than required sent an update that could be used; says how many and why the first did not.

    `state` is what to go on from: as before the round, but for the bits that were sent in vain, and with other keys.
    """

    def __init__(self, text: str, state: ServerState) -> None:
        super().__init__(text)
        self.state = state


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
    function to many clients; a pool's `map` trains them side by side, with the same result. uplink: from a client's
    message and its key to what the server receives of it; raises ClientFailure where that is nothing. guard: against
    updates whose norm is out of line. min_clients: with fewer usable updates `next` raises TooFewClients. precision: of
    forward and backward passes; weights, updates and optimizers keep the model's dtype. residuals: where clients keep
    theirs with the upload's error feedback; without it in this object's memory, beside the state: of a state before the
    last one they are gone. dropout: clients train parts of the model. Each is then sent a message of its own, and both
    encoders see sub-models only; reports of the broadcasts' adaptive stages are combined as a cohort's, of those
    clients whose updates are used. FedqError is raised where the model does not tell its units, and for what looks back
    at tensors of earlier rounds.
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
        uplink: Callable[[bytes, Key], bytes] | None = None,
        guard: NormGuard | None = None,
        min_clients: int = 1,
        precision: Precision = "float32",
        residuals: ResidualStore | None = None,
        dropout: FederatedDropout | None = None,
    ) -> None:
        self.precision: Precision = precision
        self.residuals: ResidualStore = InMemory() if residuals is None else residuals
        self.client, self.server = client, server
        self.broadcast, self.upload = broadcast or StateDictEncoder(), upload or StateDictEncoder()
        self.seed, self.device, self.map = seed, torch.device(device), map
        self.uplink, self.guard, self.min_clients = uplink, guard, min_clients
        # Modules draw their first weights from torch's global generator: lend it the run's, then put it back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Key(seed).fold("model").integer())
            # Convolutions are about a tenth faster with channels last; the wire's order is unaffected.
            self._model = model().to(self.device).to(memory_format=torch.channels_last)
        weights = self._model.state_dict()
        self._parts = self._sub_models(dropout) if dropout else None
        self._client_model = self._parts.model(self._model) if self._parts else self._model
        # messages to and from clients are of their model; parts are cut, sent and decoded where a client runs
        self._whole, self._schema = schema_of(weights), schema_of(self._client_model.state_dict())
        self._teller, self._finisher = (_EXACT, _EXACT) if self._parts else (self.broadcast, self.upload)
        self._parameters = frozenset(name for name, _ in self._model.named_parameters())
        self._initial = {name: value.detach().clone() for name, value in weights.items()}
        self._attached = schema_of(self._params_of(self.initialize()))
        self._reports = self.upload.update_spec(self._schema)
        self._residuals = self.upload.residual_schema(self._schema)
        self._in_parts = self.upload.decodes_in_parts(self._schema)
        self._local = threading.local()
        self._check_directions()
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
    def next(
        self, state: ServerState, clients: Iterable[Client], gather: Gather | None = None
    ) -> tuple[ServerState, dict[str, float]]:
        """Runs one round with a cohort of clients; returns the state after it and the round's metrics.

        `gather` has the cohort do the round's task, by `contribute` in one process or several; without it, here.

        A client without examples, that does not answer, or whose update cannot be encoded, decoded or believed, is
        left out with its weight, logged, and counted in `clients_failed` and by kind. Bits are 8 × the bytes of
        messages that were made, sent and decoded. `seconds/…` share out the round's wall time by the work done,
        whatever the number of workers. Raises TooFewClients, and Diverged where the weights cannot be sent.
        """
        clients = list(clients)
        # a checkpoint's are on the CPU
        state = replace(state, weights={name: value.to(self.device) for name, value in state.weights.items()})
        seconds = dict.fromkeys(PHASES, 0.0)
        key = Key(self.seed, state.serial)
        with _timed(seconds, "encode"):
            down, base = self.broadcast.params(self._schema, state.broadcast), b""
            reference = state.received or self._initial
            if self.broadcast.reference == "last":
                base, _ = _EXACT.encode(reference, key)
            told = self.broadcast.compensated(state.weights, state.residual)
            try:
                message, reported = self._teller.encode(told, key, down, self._params_of(state), reference=reference)
            except EncodeError as error:
                raise Diverged(f"round {state.round}: {error}: training diverged, try lower rates") from error
        task = Task(state.serial, message, state.norm, base)

        gathering = perf_counter()
        share = gather(task, clients) if gather else self.contribute(task, enumerate(clients))
        total, records = share.sums.result(), [share.records[place] for place in range(len(clients))]
        wall, work = perf_counter() - gathering, sum(share.seconds.values())
        for phase in PHASES:
            seconds[phase] += wall * share.seconds[phase] / max(work, 1e-9)
        for record in records:
            if record.failure:
                log.warning("round %d: client %d is left out: %s", state.round, record.client, record.reason)

        usable = [record for record in records if not record.failure]
        behind = sum(state.catching_up(record.client, len(base)) for record in records)
        sent = replace(
            state,
            broadcasted_bits=state.broadcasted_bits + sum(record.broadcast_bits for record in records) + 8 * behind,
            aggregated_bits=state.aggregated_bits + sum(record.bits for record in records),
        )
        if total is None or len(usable) < self.min_clients:
            reasons = [f"; client {record.client}: {record.reason}" for record in records if record.failure]
            raise TooFewClients(
                f"round {state.round}: {len(usable)} of {len(clients)} clients sent a usable update, "
                f"at least {max(self.min_clients, 1)} must{''.join(reasons[:1])}",
                replace(sent, repeats=state.repeats + 1),
            )
        with _timed(seconds, "decode"):
            up = self.upload.params(self._schema, state.upload)
            try:
                update = self._finisher.finish(total.update, key, self._whole, up, self.device)
            except MessageError as error:  # a sum may overflow
                raise Diverged(f"round {state.round}: {error}: training diverged, try lower rates") from error
        with _timed(seconds, "aggregate"):
            weight: int | Tensors = total.weight
            if self._parts:
                weight = self._parts.weights((key._replace(client=record.client), record.weight) for record in usable)
            weights, optimizer = server_step(
                self.server, state.optimizer, state.weights, self._parameters, update, weight
            )
            own_reports = self.broadcast.report(self._schema, flatten(reported)) | total.broadcast_reports
            after = replace(
                sent,
                round=state.round + 1,
                weights=weights,
                optimizer=optimizer,
                broadcast=self.broadcast.update_state(self._schema, state.broadcast, own_reports),
                upload=self.upload.update_state(self._schema, state.upload, total.reports),
                residual=self.broadcast.residual(told, share.received),
            )
            if self.broadcast.reference == "last":
                after = after.followed(share.received, len(message), len(base), [record.client for record in usable])
            if self.guard:
                norms = [record.norm for record in records if record.norm is not None]
                after = replace(after, norm=self.guard.update(state.norm, norms))
        return after, _metrics(state, after, records, seconds)

    @_one_thread()
    def contribute(self, task: Task, clients: Iterable[tuple[int, Client]]) -> Share:
        """Has some of a round's cohort do its task; each client comes with its place in the cohort.

        The clients' part of a round, and the server's for each message alone. It does not depend on the server's
        state, so that it can run on another machine.
        """
        share = Share(self._add)
        key = Key(self.seed, task.round)
        with _timed(share.seconds, "decode"):
            # All clients decode the same bytes to the same weights and only read them: once is enough.
            last = _EXACT.decode(task.base, key, self._whole, device=self.device)[0] if task.base else self._initial
            received, brought = self._teller.decode(
                task.message, key, self._whole, attached=self._attached, device=self.device, reference=last
            )
            share.received = received
        one_client = partial(self._client, task, received, brought)
        for place, contribution, record in self.map(one_client, _longest_first(clients)):
            with _timed(share.seconds, "aggregate"):
                share.sums.add(place, contribution)
            share.records[place] = record
            for phase in PHASES:
                share.seconds[phase] += record.seconds[phase]
        return share

    @_one_thread()
    def evaluate(self, state: ServerState, examples: Examples, batch_size: int = 50) -> dict[str, float]:
        """Returns the loss and accuracy of the server's weights on `examples`, as `evaluation.evaluate`."""
        self._model.load_state_dict(state.weights)
        return evaluate(self._model, examples, batch_size, self.map, self.precision)

    def _params_of(self, state: ServerState) -> dict[str, Tensor]:
        """Returns what the adaptive parts of both directions need this round, as the broadcast brings it."""
        down, up = self.broadcast.params(self._schema, state.broadcast), self.upload.params(self._schema, state.upload)
        return flatten(down) | {_UPLOAD + path: value for path, value in flatten(up).items()}

    def _client(
        self, task: Task, received: Tensors, brought: Tensors, placed: tuple[int, Client]
    ) -> tuple[int, Contribution | None, Record]:
        """Does one client's part of a round, and the server's part for its message alone."""
        place, client = placed
        record = Record(client.number)
        key = Key(self.seed, task.round, client.number)
        model = self._worker_model()
        try:
            down_reports: dict[str, Tensor] = {}
            if self._parts:
                units = self._parts.drawn(key)
                received, brought, down_reports = self._send_part(self._parts, units, received, brought, key, record)
            else:
                record.broadcast_bits = 8 * len(task.message)
            up = {path.removeprefix(_UPLOAD): value for path, value in brought.items() if path.startswith(_UPLOAD)}
            params = unflatten(up)
            with _timed(record.seconds, "train"):
                examples = client.load()
                if not len(examples.y):
                    raise ClientFailure("unable", "it has no examples")
                project = partial(self._project, received, key, params) if self.client.structured else None
                training = self.client.train(model, received, examples, key.fold("train"), project, self.precision)
                update = update_of(model.state_dict(), received)
            with _timed(record.seconds, "encode"):
                if self._residuals:
                    residual = self.residuals.load(client.number, task.round, self._residuals)
                    update = self.upload.compensated(update, {n: r.to(self.device) for n, r in residual.items()})
                loss = training.loss / max(1, training.seen)
                message, _ = self.upload.encode(update, key, params, report=True, loss=loss)
            record.bits, record.training = 8 * len(message), training
            own = None
            if self._residuals:
                message, own = self._send_and_keep(record, update, message, key, params)
            elif self.uplink:
                message = self.uplink(message, key)

            with _timed(record.seconds, "decode"):
                # the server knows no more than the message: it reads the same out of the same bytes
                decoded, reports = own or self.upload.decode(
                    message, key, self._schema, params, self._reports, self.device, partly=not self._parts
                )
            with _timed(record.seconds, "aggregate"):
                record.weight = weight = min(len(examples.y), self.client.max_examples or len(examples.y))
                scale = 1.0
                if self.guard:
                    record.norm = norm(decoded)
                    scale = self.guard.scale(record.norm, task.norm)
                update = weighted(decoded, received, weight, scale)
                if self._parts:
                    update = self._parts.whole(update, units)
                reports = self.upload.report(self._schema, reports)
                return place, Contribution(weight, update, reports, down_reports), record
        except ClientFailure as failure:
            record.failure, record.reason = failure.kind, str(failure)
        except (EncodeError, MessageError) as error:
            record.failure = "unable" if isinstance(error, EncodeError) else "refused"
            record.reason = str(error)
        return place, None, record

    def _send_and_keep(
        self, record: Record, update: Mapping[str, Tensor], message: bytes, key: Key, params: ByTensor
    ) -> tuple[bytes, tuple[dict[str, Tensor], dict[str, Tensor]] | None]:
        """Sends a client's message, and keeps what it does not tell of `update` for the client's next round.

        Returns what the server receives, and what that decodes to where it is known by then. The client keeps its
        earlier residual only where it sends nothing: what becomes of a message on the way it cannot know.
        """
        with _timed(record.seconds, "decode"):
            own = self.upload.decode(message, key, self._schema, params, self._reports, self.device)
        with _timed(record.seconds, "encode"):
            # contiguous, as it comes out of a file: strides must not depend on where it was kept
            residual = {n: r.contiguous().cpu() for n, r in self.upload.residual(update, own[0]).items()}
            for name, value in residual.items():
                if not is_finite(value):
                    raise EncodeError(f"tensor {name!r}: what its message does not tell is beyond its dtype")
        try:
            received = self.uplink(message, key) if self.uplink else message
        except ClientFailure as failure:
            if failure.kind != "silent":
                self.residuals.save(key.client, key.round, residual)
            raise
        with _timed(record.seconds, "encode"):
            self.residuals.save(key.client, key.round, residual)
        return received, own if received is message and not self._in_parts else None

    def _sub_models(self, dropout: FederatedDropout) -> SubModels:
        """Returns the model's sub-models; raises FedqError for what cannot be had together with them."""
        if "last" in (self.broadcast.reference, self.upload.reference):
            raise FedqError("run.dropout: reference=last needs clients that receive all of the model, not parts of it")
        if self.broadcast.error_feedback or self.upload.error_feedback:
            raise FedqError("run.dropout: error_feedback must be false: what is left of one part is not of the next")
        if self.client.structured:
            raise FedqError("run.dropout: client.structured must be false: a part is trained as it is")
        return SubModels(self._model, dropout)

    def _send_part(
        self, parts: SubModels, units: Units, whole: Tensors, brought: Tensors, key: Key, record: Record
    ) -> tuple[Tensors, Tensors, dict[str, Tensor]]:
        """Sends a client its part of the model; returns what it decodes, and reports to the broadcast's stages."""
        key = key.fold("broadcast")  # no random draw is shared with the upload's
        params = unflatten({path: value for path, value in brought.items() if not path.startswith(_UPLOAD)})
        with _timed(record.seconds, "encode"):
            reference = parts.cut(self._initial, units)
            part = parts.cut(whole, units)
            message, reported = self.broadcast.encode(part, key, params, brought, reference=reference)
        record.broadcast_bits = 8 * len(message)
        with _timed(record.seconds, "decode"):
            received, brought = self.broadcast.decode(
                message, key, self._schema, attached=self._attached, device=self.device, reference=reference
            )
        return received, brought, self.broadcast.report(self._schema, flatten(reported))

    def _project(
        self, weights: Mapping[str, Tensor], key: Key, params: ByTensor, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns what the server would decode of `gradients`; `weights` fill in for the schema's other tensors."""
        message, _ = self.upload.encode({**weights, **gradients}, key, params)
        decoded, _ = self.upload.decode(message, key, self._schema, params, device=self.device)
        return {name: decoded[name] for name in gradients}

    def _check_directions(self) -> None:
        """Raises FedqError for what one direction has and the other has not."""
        if self.upload.reference != "none":
            raise FedqError(
                f"upload.reference must be none, not {self.upload.reference}: an update is a difference already"
            )
        if self.broadcast.pace and self.broadcast.pace.reports == "loss":
            raise FedqError("broadcast.pace: only clients know a training loss; give it to upload.pace")
        if self.client.structured and self.upload.error_feedback:
            raise FedqError(
                "client.structured cannot go with encoder.upload.error_feedback: all of a structured update is sent, "
                "and what another round left over is not within what this one can send"
            )

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
            self.broadcast.combine(self._schema, left.broadcast_reports, right.broadcast_reports)
            if self._parts
            else {},
        )

    def _worker_model(self) -> nn.Module:
        """Returns the calling thread's own copy of the model."""
        if not hasattr(self._local, "model"):
            self._local.model = deepcopy(self._client_model)
        model: nn.Module = self._local.model
        return model


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = perf_counter()
    try:
        yield
    finally:
        seconds[phase] += perf_counter() - started


def _longest_first(clients: Iterable[tuple[int, Client]]) -> Iterator[tuple[int, Client]]:
    """Yields clients in an order that keeps all workers busy to the end: of each few, those with most examples first.

    Of few and not of all, since updates wait in memory until their neighbours in the cohort have come.
    """
    clients = iter(clients)
    while window := list(islice(clients, _WINDOW)):
        yield from sorted(window, key=lambda placed: -placed[1].examples)


def _metrics(
    before: ServerState, after: ServerState, records: list[Record], seconds: dict[str, float]
) -> dict[str, float]:
    """Returns a round's line of metrics.jsonl, but for what the loop adds."""
    usable = [record for record in records if not record.failure]
    seen = sum(record.training.seen for record in usable)
    return {
        "round": before.round,
        "train/loss": sum(record.training.loss for record in usable) / seen,
        "train/accuracy": sum(record.training.correct for record in usable) / seen,
        "broadcast_bits": after.broadcasted_bits - before.broadcasted_bits,
        "aggregated_bits": after.aggregated_bits - before.aggregated_bits,
        "cumulative_broadcasted_bits": after.broadcasted_bits,
        "cumulative_aggregated_bits": after.aggregated_bits,
        "clients": len(usable),
        "clients_failed": len(records) - len(usable),
        **{f"clients_failed/{kind}": sum(record.failure == kind for record in records) for kind in FAILURES},
        "uploads": sum(record.bits > 0 for record in records),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
    }
