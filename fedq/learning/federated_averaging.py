"""Federated averaging with encoded messages: the algorithm, as two pure steps."""

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from glob import escape
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fedq.data import Client, Examples
from fedq.encoding import EncodeError, Encoder, Key, MessageError, StateDictEncoder, ZeroOutliers, schema_of
from fedq.encoding.encoder import is_finite
from fedq.encoding.schema import Tensors
from fedq.encoding.state_dict import ByTensor, Schema, compensated, flatten
from fedq.errors import FedqError
from fedq.learning.aggregation import one_thread
from fedq.learning.client_side import EXACT, ClientSide, attached
from fedq.learning.client_state import InMemory, ResidualStore
from fedq.learning.evaluation import Map, evaluate
from fedq.learning.failures import FAILURES
from fedq.learning.guard import NormGuard
from fedq.learning.local_training import LocalTraining, Precision, channels_last
from fedq.learning.round import PHASES, Contribution, Gather, Record, Share, Task, timed
from fedq.learning.server import ServerOptimizer, ServerState, server_step
from fedq.learning.submodel import FederatedDropout, SubModels

log = logging.getLogger(__name__)


class Diverged(FedqError):
    """The server's weights hold NaN or infinity and cannot be sent; names the tensor."""


class TooFewClients(FedqError):
    """Fewer clients than required sent an update that could be used; says how many and why the first did not.

    `state` is what to go on from: as before the round, but for the bits that were sent in vain, and with other keys.
    `counts` are the cohort's metrics that add up over cohorts: failures, uploads, seconds.
    """

    def __init__(self, text: str, state: ServerState, counts: dict[str, float]) -> None:
        super().__init__(text)
        self.state, self.counts = state, counts


class FederatedAveraging:
    """Federated Averaging (McMahan 2016, algorithm 1) with a server optimizer (Reddi 2021) and encoders both ways.

    process = FederatedAveraging(model, client, server, broadcast, upload)
    state = process.initialize()
    state, metrics = process.next(state, clients)

    model: builds the network, as a class or a `functools.partial` of one. client: local training; where it is
    `structured`, the upload must be a projection on a linear subspace, else FedqError is raised. server: builds the
    server optimizer. broadcast, upload: what encodes each direction; with error feedback, FedqError is raised for a
    chain that leaves more of normal numbers than they were. seed: of every random draw. map: applies a function to many
    clients; a pool's `map` trains them side by side, with the same result. uplink: from a client's message and its key
    to what the server receives of it; raises ClientFailure where that is nothing. guard: against updates whose norm is
    out of line. min_clients: with fewer usable updates `next` raises TooFewClients. precision: of forward and backward
    passes; weights, updates and optimizers keep the model's dtype. residuals: where clients keep theirs with the
    upload's error feedback; without it in this object's memory, beside the state: of a state before the last one they
    are gone. submodel: clients train parts of the model. Each is then sent a message of its own, and both encoders see
    sub-models only; reports of the broadcasts' adaptive stages are combined as a cohort's, of those clients whose
    updates are used. FedqError is raised where the model does not tell its units, and for what looks back at tensors of
    earlier rounds; as it is for a rule of an encoder that no tensor of the model follows.
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
        submodel: FederatedDropout | None = None,
    ) -> None:
        broadcast, upload = broadcast or StateDictEncoder(), upload or StateDictEncoder()
        _check(client, broadcast, upload, submodel)
        self.server, self.min_clients = server, min_clients
        self.seed, self.device = seed, torch.device(device)
        # Modules draw their first weights from torch's global generators: lend them the run's, then put them back.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(Key(seed).fold("model").integer())
            self._model = channels_last(model().to(self.device))
        _check_model(self._model)
        # what is frozen gets no gradient, and stays: neither weight decay on the server nor dither may move it
        self._parameters = frozenset(name for name, p in self._model.named_parameters() if p.requires_grad)
        self._frozen = frozenset(name for name, p in self._model.named_parameters() if not p.requires_grad)
        self.broadcast = broadcast = _fitted("broadcast", broadcast, self._model)
        self.upload = upload = _fitted("upload", upload, self._model)
        parts = SubModels(self._model, submodel) if submodel else None
        residuals = InMemory() if residuals is None else residuals
        self.client_side = ClientSide(
            self._model, client, broadcast, upload, seed, self.device, map, uplink, guard, precision, residuals, parts
        )
        self.contribute, self._schema = self.client_side.contribute, self.client_side.schema
        # where all travels exact there is no difference to follow
        self._follows = broadcast.reference == "last" and broadcast.differs(self._schema)
        for way, encoder in (("broadcast", broadcast), ("upload", upload)):
            if encoder.error_feedback:
                _check_feedback(way, encoder, self._schema, Key(seed).fold("check"))

    def initialize(self) -> ServerState:
        """Returns the state before the first round."""
        return ServerState(
            round=0,
            weights=self.client_side.initial,
            optimizer={},
            broadcast=self.broadcast.initial_state(self._schema),
            upload=self.upload.initial_state(self._schema),
        )

    @one_thread()
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
        if len({client.number for client in clients}) < len(clients):
            raise FedqError("two clients of a cohort have the same number, and so would draw the same")
        # a checkpoint's are on the CPU
        weights, residual, received = (
            {name: value.to(self.device) for name, value in tensors.items()}
            for tensors in (state.weights, state.residual, state.received)
        )
        state = replace(state, weights=weights, residual=residual, received=received)
        if isinstance(store := self.client_side.residuals, InMemory):
            store.begin(state.serial)
        seconds = dict.fromkeys(PHASES, 0.0)
        with timed(seconds, "encode"):
            up = self.upload.params(self._schema, state.upload)
            told = compensated(state.weights, state.residual)
            task, reported = self._task(state, told, up)

        share, total, records = self._gathered(task, clients, gather, seconds)
        for record in records:
            if record.failure:
                log.warning("round %d: client %d is left out: %s", state.round, record.client, record.reason)
        usable = [record for record in records if not record.failure]
        behind = sum(state.catching_up(record.client, len(task.base)) for record in records) if self._follows else 0
        sent = replace(
            state,
            broadcasted_bits=state.broadcasted_bits + sum(record.broadcast_bits for record in records) + 8 * behind,
            aggregated_bits=state.aggregated_bits + sum(record.bits for record in records),
        )
        if guard := self.client_side.guard:
            norms = [record.norm for record in records if record.norm is not None]
            sent = replace(sent, norm=guard.update(state.norm, norms))
        if total is None or len(usable) < self.min_clients:
            # who answered has caught up with the rounds that were done
            caught_up = dict.fromkeys((record.client for record in usable), state.round) if self._follows else {}
            reasons = [f"; client {record.client}: {record.reason}" for record in records if record.failure]
            raise TooFewClients(
                f"round {state.round}: {len(usable)} of {len(clients)} clients sent a usable update, "
                f"at least {max(self.min_clients, 1)} must{''.join(reasons[:1])}",
                replace(sent, repeats=state.repeats + 1, holders=state.holders | caught_up),
                _counts(records, seconds),
            )

        weights, optimizer = self._stepped(state, total, usable, up, seconds)
        with timed(seconds, "aggregate"):
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
            if self._follows:
                holders = [record.client for record in usable]
                after = after.followed(share.received, len(task.message), len(task.base), holders)
        return after, _metrics(state, after, records, seconds)

    @one_thread()
    def evaluate(self, state: ServerState, examples: Examples, batch_size: int = 50) -> dict[str, float]:
        """Returns the loss and accuracy of the server's weights on `examples`, as `evaluation.evaluate`."""
        model = deepcopy(self._model)  # which may write to what weights do not hold of it
        model.load_state_dict(state.weights)
        return evaluate(model, examples, batch_size, self.client_side.map, self.client_side.precision)

    def _task(self, state: ServerState, told: Tensors, up: ByTensor) -> tuple[Task, ByTensor]:
        """Encodes a round's broadcast; returns it with all that clients get, and its report to the adaptive stages."""
        key, reference, base = Key(self.seed, state.serial), state.received or self.client_side.initial, b""
        down = self.broadcast.params(self._schema, state.broadcast)
        if self._follows:
            base, _ = EXACT.encode(reference, key)
        try:
            message, reported = self.client_side.to_all.encode(told, key, down, attached(down, up), reference=reference)
        except EncodeError as error:
            if all(map(is_finite, state.weights.values())):  # the encoder does not take such tensors
                raise
            raise Diverged(f"round {state.round}: {error}: training diverged, try lower rates") from error
        return Task(state.serial, message, state.norm, base), reported

    def _gathered(
        self, task: Task, clients: Sequence[Client], gather: Gather | None, seconds: dict[str, float]
    ) -> tuple[Share, Contribution | None, list[Record]]:
        """Has the cohort do a task; returns what that came to, the sum over it, and records in the cohort's order."""
        started = perf_counter()
        share = gather(task, clients) if gather else self.contribute(task, enumerate(clients))
        total, records = share.sums.result(), [share.records[place] for place in range(len(clients))]
        wall, work = perf_counter() - started, sum(share.seconds.values())
        for phase in PHASES:
            seconds[phase] += wall * share.seconds[phase] / max(work, 1e-9)
        return share, total, records

    def _stepped(
        self, state: ServerState, total: Contribution, usable: list[Record], up: ByTensor, seconds: dict[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Hands the mean of a cohort's updates to the server optimizer; returns the next weights and its state."""
        key, parts = Key(self.seed, state.serial), self.client_side.parts
        with timed(seconds, "decode"):
            try:
                # those of parts are decoded where a client runs
                finisher = EXACT if parts else self.upload
                update = finisher.finish(total.update, key, self.client_side.whole, up)
            except MessageError as error:  # a sum may overflow
                raise Diverged(f"round {state.round}: {error}: training diverged, try lower rates") from error
        with timed(seconds, "aggregate"):
            weight: int | Tensors = total.weight
            if parts:
                weight = parts.weights((key._replace(client=record.client), record.weight) for record in usable)
            after, optimizer = server_step(
                self.server, state.optimizer, state.weights, self._parameters, update, weight
            )
            return after | {name: state.weights[name] for name in self._frozen}, optimizer


def _check(
    client: LocalTraining, broadcast: StateDictEncoder, upload: StateDictEncoder, submodel: FederatedDropout | None
) -> None:
    """Raises FedqError for what cannot be had together, or in one of the directions."""
    if submodel and "last" in (broadcast.reference, upload.reference):
        raise FedqError("run.submodel: reference=last needs clients that receive all of the model, not parts of it")
    if submodel and (broadcast.error_feedback or upload.error_feedback):
        raise FedqError("run.submodel: error_feedback must be false: what is left of one part is not of the next")
    if submodel and client.structured:
        raise FedqError("run.submodel: client.structured must be false: a part is trained as it is")
    if upload.reference != "none":
        raise FedqError(f"upload.reference must be none, not {upload.reference}: an update is a difference already")
    if broadcast.rate_control and broadcast.rate_control.reports == "loss":
        raise FedqError("broadcast.rate_control: only clients know a training loss; give it to upload.rate_control")
    if client.structured and upload.error_feedback:
        raise FedqError(
            "client.structured cannot go with encoder.upload.error_feedback: all of a structured update is sent, "
            "and what another round left over is not within what this one can send"
        )


def _fitted(way: str, encoder: StateDictEncoder, model: nn.Module) -> StateDictEncoder:
    """Returns `encoder` with small floating buffers exact whatever its threshold, but where a rule is for them.

    Batch norm's running variances are no weights: with a step that suits those they would be rounded to below 0.
    Raises FedqError for a rule that no tensor follows.
    """
    schema, largest = schema_of(model.state_dict()), StateDictEncoder().threshold
    if idle := encoder.idle_rules(schema):
        raise FedqError(
            f"encoder.{way}.rules: no tensor follows {idle[0]!r}: it fits none, or one before it does; there: "
            f"{', '.join(schema)}"
        )
    buffers = {name: schema[name] for name, _ in model.named_buffers() if name in schema}
    exact = [name for name, spec in buffers.items() if spec.dtype.is_floating_point and spec.numel <= largest]
    rules = {escape(name): Encoder() for name in exact}
    return replace(encoder, rules={**encoder.rules, **rules}) if rules else encoder


def _check_model(model: nn.Module) -> None:
    """Raises FedqError where two names stand for the same memory: each would be sent and changed by itself.

    And for tensors of which there is no mean: complex ones, and floats too narrow for torch to add up.
    """
    places: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.itemsize < 2):
            raise FedqError(
                f"model: {name!r} is {str(tensor.dtype).removeprefix('torch.')}: there is a mean of floats of 16 to 64 "
                "bits, integers and booleans only; a buffer that never changes needs persistent=False"
            )
        if tensor.numel() and (first := places.setdefault(tensor.data_ptr(), name)) != name:
            raise FedqError(f"model: {first!r} and {name!r} are one tensor: weights that are tied cannot be trained")


def _check_feedback(way: str, encoder: StateDictEncoder, schema: Schema, key: Key) -> None:
    """Raises FedqError where more is left of normal numbers than they were: residuals then grow without end.

    Error feedback needs a contraction (Karimireddy 2019); what is scaled up to be unbiased often is none.
    """
    for _, chain in encoder.chains(schema).values():
        if any(isinstance(stage, ZeroOutliers) for stage in chain.stages):
            raise FedqError(
                f"encoder.{way}.error_feedback must be false with ZeroOutliers: what is left out would be in the next"
            )
    draw, names = key.generator(), encoder.residual_schema(schema)
    zeros = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in schema.items()}
    told = {name: torch.from_numpy(draw.standard_normal(schema[name].shape)).to(schema[name].dtype) for name in names}
    params = encoder.params(schema, encoder.initial_state(schema))
    message, _ = encoder.encode(zeros | told, key, params, reference=zeros, loss=1.0)
    heard, _ = encoder.decode(message, key, schema, params, reference=zeros)
    left = sum(float((told[name] - heard[name]).double().square().sum()) for name in names)
    error = left / max(1.0, sum(float(value.double().square().sum()) for value in told.values()))
    if error > 1.001:
        raise FedqError(
            f"encoder.{way}.error_feedback must be false: of normal numbers this chain leaves {error:.2f} times their "
            "squares, so that residuals would grow from round to round; take one that does not scale up what it sends"
        )


def _counts(records: Sequence[Record], seconds: dict[str, float]) -> dict[str, float]:
    """Returns those metrics of a cohort that add up over cohorts; `uploads` are the messages that clients sent."""
    failures = [record.failure for record in records if record.failure]
    return {
        "clients_failed": len(failures),
        **{f"clients_failed/{kind}": failures.count(kind) for kind in FAILURES},
        "uploads": sum(record.bits > 0 for record in records),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
    }


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
        **_counts(records, seconds),
    }
