"""The clients' side of a round: from the task that the server gives to what it adds up."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from fedq.data import Client, Examples
from fedq.encoding import EncodeError, Key, MessageError, StateDictEncoder, schema_of
from fedq.encoding.encoder import is_finite
from fedq.encoding.schema import Tensors
from fedq.encoding.state_dict import ByTensor, compensated, flatten, unflatten
from fedq.errors import FedqError
from fedq.learning.aggregation import one_thread
from fedq.learning.client_state import ResidualStore
from fedq.learning.evaluation import Map
from fedq.learning.failures import ClientFailure
from fedq.learning.guard import NormGuard, norm
from fedq.learning.local_training import LocalTraining, Precision, check_nothing_drawn, generators, update_of
from fedq.learning.round import PHASES, Contribution, Record, Share, Task, timed
from fedq.learning.server import weighted
from fedq.learning.submodel import SubModels, Units

log = logging.getLogger(__name__)

EXACT = StateDictEncoder()

_UPLOAD = "upload/"  # before the names of the upload's params among what a broadcast attaches
_WINDOW = 16  # clients that are put in order of size at a time: so many updates may wait for their neighbours'


@dataclass(eq=False)
class ClientSide:
    """The clients' part of a round, and the server's for each message alone.

    It does not depend on the server's state, so that it can run on another machine. Its fields are FederatedAveraging's
    arguments; `model` is the whole one, of which clients train `parts` with federated dropout. Raises FedqError where
    the client is `structured` and the upload is not a projection.
    """

    model: nn.Module
    client: LocalTraining
    broadcast: StateDictEncoder
    upload: StateDictEncoder
    seed: int
    device: torch.device
    map: Map
    uplink: Callable[[bytes, Key], bytes] | None
    guard: NormGuard | None
    precision: Precision
    residuals: ResidualStore
    parts: SubModels | None

    def __post_init__(self) -> None:
        weights = self.model.state_dict()
        self.initial = {name: value.detach().clone() for name, value in weights.items()}
        self._client_model = self.parts.model(self.model) if self.parts else self.model
        # messages to and from clients are of their model; parts are cut, sent and decoded where a client runs
        self.whole, self.schema = schema_of(weights), schema_of(self._client_model.state_dict())
        self.to_all = EXACT if self.parts else self.broadcast
        down, up = (e.params(self.schema, e.initial_state(self.schema)) for e in (self.broadcast, self.upload))
        self._attached = schema_of(attached(down, up))
        self._reports = self.upload.update_spec(self.schema)
        self._residuals = self.upload.residual_schema(self.schema)
        self._in_parts = self.upload.decodes_in_parts(self.schema)
        self._local = threading.local()
        buffers = dict(self._client_model.named_buffers())
        self._unsent = {name: value for name, value in buffers.items() if name not in self.schema}
        if self.client.structured:
            self._check_projection(up)

    @one_thread()
    def contribute(self, task: Task, clients: Iterable[tuple[int, Client]]) -> Share:
        """Has some of a round's cohort do its task; each client comes with its place in the cohort."""
        share = Share(self._add)
        key = Key(self.seed, task.round)
        with timed(share.seconds, "decode"):
            # All clients decode the same bytes to the same weights and only read them: once is enough.
            last = EXACT.decode(task.base, key, self.whole, device=self.device)[0] if task.base else self.initial
            received, brought = self.to_all.decode(
                task.message, key, self.whole, attached=self._attached, device=self.device, reference=last
            )
            share.received = received
        one_client = partial(self._client, task, received, brought)
        for place, contribution, record in self.map(one_client, _longest_first(clients)):
            with timed(share.seconds, "aggregate"):
                share.sums.add(place, contribution)
            share.records[place] = record
            for phase in PHASES:
                share.seconds[phase] += record.seconds[phase]
        return share

    def _client(
        self, task: Task, received: Tensors, brought: Tensors, placed: tuple[int, Client]
    ) -> tuple[int, Contribution | None, Record]:
        """Does one client's part of a round, and the server's part for its message alone; notes where that fails."""
        place, client = placed
        record = Record(client.number)
        try:
            return place, self._contribution(task, received, brought, client, record), record
        except ClientFailure as failure:
            record.failure, record.reason = failure.kind, str(failure)
            if failure.__cause__:
                log.debug("round %d: client %d:", task.round, client.number, exc_info=failure.__cause__)
        except (EncodeError, MessageError) as error:
            record.failure = "unable" if isinstance(error, EncodeError) else "refused"
            record.reason = str(error)
        if record.failure in ("silent", "unable"):
            record.bits = 0  # it sent nothing, whatever it had ready
        return place, None, record

    def _contribution(
        self, task: Task, received: Tensors, brought: Tensors, client: Client, record: Record
    ) -> Contribution:
        """Has a client receive, train and send; returns what the server adds up of its message."""
        key, model = Key(self.seed, task.round, client.number), self._worker_model()
        down_reports: dict[str, Tensor] = {}
        if self.parts:
            units = self.parts.drawn(key)
            received, brought, down_reports = self._send_part(self.parts, units, received, brought, key, record)
        else:
            record.broadcast_bits = 8 * len(task.message)
        _, params = _detached(brought)
        with timed(record.seconds, "train"):
            try:
                before = generators(self.device)
                examples = _loaded(client)
                check_nothing_drawn(before, self.device)
                if not len(examples.y):
                    raise ClientFailure("unable", "it has no examples")
                project = partial(self._project, received, key, params) if self.client.structured else None
                training = self.client.train(model, received, examples, key.fold("train"), project, self.precision)
            except (FedqError, ClientFailure):
                raise
            except Exception as error:  # whatever its data or the model does on them
                raise ClientFailure("unable", f"{type(error).__name__}: {error}") from error
            update = update_of(model.state_dict(), received)
        with timed(record.seconds, "encode"):
            if self._residuals:
                residual = self.residuals.load(client.number, task.round, self._residuals)
                update = compensated(update, {n: r.to(self.device) for n, r in residual.items()})
            loss = training.loss / max(1, training.seen)
            message, _ = self.upload.encode(update, key, params, report=True, loss=loss)
        record.bits, record.training = 8 * len(message), training
        own = None
        if self._residuals:
            message, own = self._send_and_keep(record, update, message, key, params)
        elif self.uplink:
            message = self.uplink(message, key)

        with timed(record.seconds, "decode"):
            # the server knows no more than the message: it reads the same out of the same bytes
            decoded, reports = own or self.upload.decode(
                message, key, self.schema, params, self._reports, self.device, partly=not self.parts
            )
        with timed(record.seconds, "aggregate"):
            # as its number, how many examples a client has is known beforehand: it might tell any in a message
            record.weight = weight = min(len(examples.y), self.client.max_examples or len(examples.y))
            scale = 1.0
            if self.guard:
                record.norm = norm(decoded)
                scale = self.guard.scale(record.norm, task.norm)
            update = weighted(decoded, received, weight, scale)
            for name, value in update.items():
                if not is_finite(value):
                    raise MessageError(f"tensor {name!r} times {weight} examples is beyond {value.dtype}")
            if self.parts:
                update = self.parts.whole(update, units)
            return Contribution(weight, update, self.upload.report(self.schema, reports), down_reports)

    def _send_part(
        self, parts: SubModels, units: Units, whole: Tensors, brought: Tensors, key: Key, record: Record
    ) -> tuple[Tensors, Tensors, dict[str, Tensor]]:
        """Sends a client its part of the model; returns what it decodes, and reports to the broadcast's stages."""
        key = key.fold("broadcast")  # no random draw is shared with the upload's
        params, _ = _detached(brought)
        with timed(record.seconds, "encode"):
            reference = parts.cut(self.initial, units)
            part = parts.cut(whole, units)
            message, reported = self.broadcast.encode(part, key, params, brought, reference=reference)
        record.broadcast_bits = 8 * len(message)
        with timed(record.seconds, "decode"):
            received, brought = self.broadcast.decode(
                message, key, self.schema, attached=self._attached, device=self.device, reference=reference
            )
        return received, brought, self.broadcast.report(self.schema, flatten(reported))

    def _send_and_keep(
        self, record: Record, update: Mapping[str, Tensor], message: bytes, key: Key, params: ByTensor
    ) -> tuple[bytes, tuple[dict[str, Tensor], dict[str, Tensor]] | None]:
        """Sends a client's message, and keeps what it does not tell of `update` for the client's next round.

        Returns what the server receives, and what that decodes to where it is known by then. The client keeps its
        earlier residual only where it sends nothing: what becomes of a message on the way it cannot know.
        """
        with timed(record.seconds, "decode"):
            own = self.upload.decode(message, key, self.schema, params, self._reports, self.device)
        with timed(record.seconds, "encode"):
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
        with timed(record.seconds, "encode"):
            self.residuals.save(key.client, key.round, residual)
        return received, own if received is message and not self._in_parts else None

    def _project(
        self, weights: Mapping[str, Tensor], key: Key, params: ByTensor, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns what the server would decode of `gradients`; `weights` fill in for the schema's other tensors."""
        message, _ = self.upload.encode({**weights, **gradients}, key, params, loss=0.0)
        decoded, _ = self.upload.decode(message, key, self.schema, params, device=self.device)
        return {name: decoded[name] for name in gradients}

    def _check_projection(self, params: ByTensor) -> None:
        """Raises FedqError unless what two steps of a client add up to can be sent without loss."""
        project = partial(self._project, self.initial, Key(self.seed), params)
        steps = {name: self.initial[name] for name, _ in self.model.named_parameters()}
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
            self.upload.combine(self.schema, left.reports, right.reports),
            self.broadcast.combine(self.schema, left.broadcast_reports, right.broadcast_reports) if self.parts else {},
        )

    def _worker_model(self) -> nn.Module:
        """Returns the calling thread's own copy of the model; what weights do not hold of it is as it was at first."""
        if not hasattr(self._local, "model"):
            self._local.model = deepcopy(self._client_model)
        model: nn.Module = self._local.model
        for name, value in self._unsent.items():
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, value.clone())
        return model


def attached(down: ByTensor, up: ByTensor) -> dict[str, Tensor]:
    """Returns what the adaptive parts of both directions need this round, as the broadcast brings it."""
    return flatten(down) | {_UPLOAD + path: value for path, value in flatten(up).items()}


def _detached(brought: Tensors) -> tuple[ByTensor, ByTensor]:
    """The inverse of `attached`."""
    up = {path.removeprefix(_UPLOAD): value for path, value in brought.items() if path.startswith(_UPLOAD)}
    return unflatten({path: value for path, value in brought.items() if not path.startswith(_UPLOAD)}), unflatten(up)


def _loaded(client: Client) -> Examples:
    """Returns a client's examples. Raises FedqError where a file cannot be read: that is no client's fault."""
    try:
        return client.load()
    except OSError as error:
        raise FedqError(f"the dataset's client {client.number} cannot be read: {error}") from error


def _longest_first(clients: Iterable[tuple[int, Client]]) -> Iterator[tuple[int, Client]]:
    """Yields clients in an order that keeps all workers busy to the end: of each few, those with most examples first.

    Of few and not of all, since updates wait in memory until their neighbours in the cohort have come.
    """
    clients = iter(clients)
    while window := list(islice(clients, _WINDOW)):
        yield from sorted(window, key=lambda placed: -placed[1].examples)
