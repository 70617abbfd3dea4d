"""What both halves of a round agree on before the first round, and how a client reads a broadcast."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from glob import escape

import torch
from torch import Tensor, nn

from fedq.data import Examples
from fedq.encoding import Codec, Key, MessageError, StateDictEncoder, TensorSpec, schema_of
from fedq.encoding.message import SchemaMismatch, peek
from fedq.encoding.schema import Tensors
from fedq.errors import FedqError
from fedq.keys import BROADCAST
from fedq.learning.algorithm import FedAvg
from fedq.learning.checks import check_feedback, check_model, check_phases, check_scaled, check_together, fitted
from fedq.learning.draws import seeded
from fedq.learning.error_feedback import Direction, ErrorFeedback
from fedq.learning.failures import ClientFailure, OtherBase
from fedq.learning.group import Group, upload_params
from fedq.learning.local_training import LocalTraining, channels_last
from fedq.learning.optimizers import stepped, tried
from fedq.learning.parts import as_bytes, checksum, digest, parts_of
from fedq.learning.report import Reports
from fedq.learning.round import Received, Registered
from fedq.learning.state import ServerState
from fedq.learning.submodel import FederatedDropout, SubModels
from fedq.learning.task import Task

EXACT = StateDictEncoder()


class Protocol:
    """What both halves of a round hold. Each half derives these values from the configuration and the seed.

    seed: The seed of every random draw.
    device: Where tensors are decoded and models are trained.
    algorithm: The federated algorithm.
    training: The clients' local training.
    task: The loss and the metrics.
    model: The model, with the weights before the first round.
    initial: The weights before the first round.
    parts: The tensors of the model that travel, and the others.
    parameters: The names of the trainable parameters that travel.
    submodels: The sub-models of federated dropout; None if clients train the whole model.
    client_model: What clients train: `model`, or a sub-model.
    shared: The frozen parameters that all copies of `model` share → their checksums. Sub-models share none.
    base: The SHA-256 of the frozen tensors, in hexadecimal; "" without frozen tensors.
    weights: The group of the model's weights, or of a sub-model's.
    phases: The parameters that rest in each round of the algorithm's cycle.
    groups: All groups by name; `weights` is the first.
    projection: The codec that projects steps of structured updates, so that an upload can send the update exactly; or
        None.
    to_all: The codec of the broadcast of weights. With federated dropout, this broadcast is the complete model, exact;
        each client's message is a part.
    exact: The codec of an exact message of all weights.
    reports: Writes and reads clients' reports.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        client: LocalTraining,
        broadcast: Direction,
        upload: Direction,
        algorithm: FedAvg,
        task: Task,
        submodel: FederatedDropout | None,
        seed: int,
        device: torch.device,
    ) -> None:
        """Takes arguments of FederatedAveraging. Raises FedqError if they cannot be combined; see `checks`."""
        self.seed, self.device, self.algorithm, self.training, self.task = seed, device, algorithm, client, task
        self.broadcast_feedback = isinstance(broadcast, ErrorFeedback)
        self.upload_feedback = isinstance(upload, ErrorFeedback)
        down, up = (way.encoder if isinstance(way, ErrorFeedback) else way for way in (broadcast, upload))
        check_together(client, algorithm, broadcast, upload, submodel)
        with seeded(Key(seed).fold("model"), device):
            built = model()
        self.parts = parts = parts_of(built, algorithm.frozen, algorithm.personal)
        check_model(built, parts, submodel)
        self.model = channels_last(built.to(device))
        state = self.model.state_dict()
        frozen = {} if submodel else {name for name, _ in self.model.named_parameters()} & set(parts.frozen)
        self.shared = {name: checksum(state[name]) for name in parts.frozen if name in frozen}
        self.initial = parts.with_ties(
            {name: value if name in self.shared else value.clone() for name, value in state.items()}
        )
        self.parameters = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and name not in parts.personal
        ]
        self.submodels = SubModels(self.model, submodel) if submodel else None
        self.client_model = self.submodels.model(self.model) if self.submodels else self.model
        down, up = fitted("broadcast", down, self.model, parts), fitted("upload", up, self.model, parts)
        schema = schema_of(parts.travelling(self.client_model.state_dict()))
        for way, direction, encoder in (("broadcast", broadcast, down), ("upload", upload, up)):
            if isinstance(direction, ErrorFeedback):
                check_feedback(way, encoder.bind(schema), Key(seed).fold("check"))
        self.projection = up.bind(schema) if client.structured else None
        self.weights = Group.of(schema, down, up)
        check_scaled(algorithm, self.weights.upload, self.client_model)
        self.groups = {"weights": self.weights}
        self.phases = algorithm.phases(self.parameters)
        self._uploads = [self.weights.upload]
        if len(self.phases) > 1:
            check_phases(algorithm, client, upload, self.weights.upload)
            sent = [{name: schema[name] for name in schema if name not in rest} for rest in self.phases]
            self._uploads = [up.bind(part, reports=True) for part in sent]
        self.initial_groups: dict[str, Tensor] = {}
        for name, tensors in algorithm.groups({name: self.initial[name] for name in self.parameters}).items():
            prefix = f"*{name}/"
            its_down, its_up = (
                replace(way, reference="none", rules={escape(prefix) + p: rule for p, rule in way.rules.items()})
                for way in (down, up)
            )
            self.groups[name] = Group.of(schema_of(tensors), its_down, its_up, prefix)
            self.initial_groups |= tensors
        travelling = schema_of(parts.travelling(state))
        self.exact = EXACT.bind(travelling)
        attached = self.weights.broadcast.attached_schema
        self.to_all = EXACT.bind(travelling, attached) if self.submodels else self.weights.broadcast
        base = self.initial if down.reference == "initial" else parts.frozen
        self._base = EXACT.bind({name: TensorSpec.of(as_bytes(self.initial[name])) for name in base})
        self._agree_on_base()
        # if all tensors travel exact, no message has a reference
        self.follows = down.reference == "last" and self.weights.broadcast.sends_differences
        self.reports = Reports(task, client)
        self.kept_schema = dict(algorithm.kept_schema(schema_of({n: self.initial[n] for n in self.parameters})))
        if client.optimizer or client.keep_optimizer:
            trained = {name: self.initial[name] for name, p in self.model.named_parameters() if p.requires_grad}
            optimizer = tried("client.optimizer", lambda: stepped(client.optimizer_of, trained))
            self.kept_schema |= schema_of(optimizer.state()) if client.keep_optimizer else {}
        if self.upload_feedback:
            self.kept_schema |= {name: schema[name] for name in self.weights.upload.compressed}
        self.kept_schema |= schema_of({name: self.initial[name] for name in parts.personal})

    def receive(
        self, messages: Sequence[bytes], held: Sequence[Tensors] = (), client: int = BROADCAST, after: int = 0
    ) -> Received:
        """Returns what a client decodes from a broadcast.

        messages: One message a group, in order. With reference=last, earlier messages come first: the broadcasts that
            the client missed, or an exact message of the reference.
        held: With reference=last, the `weights` and the `reference` that the client received last. A round that is
            repeated builds on the reference again. The client holds the initial weights too.
        client: The client's number if the messages are for this client alone, as with federated dropout.
        after: The `attempt` of the last broadcast that the client received. A client on a network keeps this number: an
            older broadcast, which someone may have recorded, is refused.

        Earlier messages that build on other weights are skipped: the client has decoded them before, but the answer was
        lost.

        Raises MessageError for damaged or old messages, and for messages of another run. Raises ClientFailure if the
        client does not hold the weights that a message builds on. Raises OtherBase if the server's base may help; see
        `write_base`.
        """
        if self.begins_with_base(messages):
            self._take_base(messages[0])
            messages = messages[1:]
        try:
            received = self._receive(messages, held, client)
        except (SchemaMismatch, ClientFailure) as error:
            if self._base.schema and not held:
                raise OtherBase("lost", str(error)) from error
            raise
        if received.attempt < after:
            raise MessageError(f"the broadcast of attempt {received.attempt} is older than the last one, {after}")
        return received

    def _receive(self, messages: Sequence[bytes], held: Sequence[Tensors], client: int) -> Received:
        start = len(messages) - len(self.groups)
        if start < 0 or (start and not self.follows):
            raise MessageError(f"a broadcast has {len(self.groups)} messages, this one {len(messages)}")
        references = [*held, self.initial]
        for place, message in enumerate(messages[: start + 1]):
            key = Key(self.seed, peek(message)[1].round, client)
            codec, draws = self.to_all, key
            reference: Tensors = self.initial
            if client != BROADCAST and self.submodels:
                codec, draws = self.weights.broadcast, key.fold("broadcast")
                reference = self.submodels.cut(self.initial, self.submodels.drawn(key))
            elif place < start and self.exact.expects(message, {}):
                codec = self.exact
            elif self.follows:
                fitting = [weights for weights in references if codec.expects(message, weights)]
                if not fitting and place < start:
                    continue  # the client has this broadcast already
                if not fitting:
                    raise ClientFailure("lost", "it does not hold the weights that the broadcast builds on")
                reference = fitting[0]
            weights, attached = codec.decode(message, draws, reference=reference, device=self.device)
            references = [weights]
        tensors: dict[str, Tensor] = {}
        for group, message in zip(list(self.groups.values())[1:], messages[start + 1 :], strict=True):
            decoded, more = group.broadcast.decode(message, key, device=self.device)
            tensors, attached = tensors | decoded, attached | more
        return Received(key.round, weights, tensors, attached, upload_params(attached), reference)

    def start(self, weights: Tensors, kept: Tensors, key: Key) -> dict[str, Tensor]:
        """Returns a client's state_dict: the given weights, with the frozen tensors and the client's personal tensors.

        kept: The client's store; if empty, the personal tensors are the first weights.
        key: The client's key of the round, for its sub-model.

        The `shared` tensors are left out: the client's model has them.
        """
        frozen = {name: self.initial[name] for name in self.parts.frozen}
        if frozen and self.submodels:
            frozen = self.submodels.cut(frozen, self.submodels.drawn(key))
        personal = {name: (kept or self.initial)[name].to(self.device) for name in self.parts.personal}
        return self.without_shared(self.parts.with_ties({**frozen, **weights, **personal}))

    def without_shared(self, tensors: Tensors) -> dict[str, Tensor]:
        """Returns a state_dict without the tensors that all copies of the model share."""
        tied = self.parts.tied
        return {name: value for name, value in tensors.items() if tied.get(name, name) not in self.shared}

    def without_base(self, state: ServerState) -> ServerState:
        """Returns a state for a checkpoint. The frozen tensors are left out: they follow from the configuration."""
        weights = {name: value for name, value in state.weights.items() if not self._is_frozen(name)}
        return replace(state, weights=weights, base=self.base)

    def with_base(self, state: ServerState) -> ServerState:
        """Returns the state of a checkpoint with the frozen tensors. Raises FedqError if the run had others."""
        # earlier versions saved the frozen tensors, without their digest
        saved = {name: state.weights[name] for name in self.parts.frozen if name in state.weights}
        if (digest(saved).hex() if saved else state.base) != self.base:
            raise FedqError("its checkpoint is of another model: the frozen tensors differ")
        weights = state.weights | {name: value for name, value in self.initial.items() if self._is_frozen(name)}
        in_order = {name: weights[name] for name in self.initial if name in weights}
        return replace(state, weights=in_order | weights, base="")

    def _is_frozen(self, name: str) -> bool:
        return self.parts.tied.get(name, name) in self.parts.frozen

    def write_base(self, attempt: int) -> bytes:
        """Returns the message of the base: the frozen tensors or, with reference=initial, all first weights.

        If a client's base differs, the fingerprints of all messages differ. The client then raises OtherBase, and the
        server sends the base.
        """
        tensors = {name: as_bytes(self.initial[name]) for name in self._base.schema}
        return self._base.encode(tensors, Key(self.seed, attempt)).message

    def begins_with_base(self, messages: Sequence[bytes]) -> bool:
        """Returns whether the first of a client's messages is a base; see `write_base`."""
        return bool(self._base.schema and messages and self._base.expects(messages[0], {}))

    def _take_base(self, message: bytes) -> None:
        """Replaces this side's base by the one in a message. During the call, no other thread may train."""
        key = Key(self.seed, peek(message)[1].round)
        for name, data in self._base.decode(message, key, device=self.device).tensors.items():
            value = self.initial[name]
            self.initial[name] = data.clone().view(value.dtype).reshape(value.shape)
            if name in self.shared:
                self.model.get_parameter(name).data = self.initial[name]
                self.shared[name] = checksum(self.initial[name])
        self.initial = self.parts.with_ties(self.initial)
        self._agree_on_base()

    def _agree_on_base(self) -> None:
        self.base = ""
        if frozen := {name: self.initial[name] for name in self.parts.frozen}:
            self.base = (agreed := digest(frozen)).hex()
            for codec in (self.weights.broadcast, self.weights.upload, *self._uploads, self.to_all, self.exact):
                codec.agree_on(agreed)

    def resting(self, attempt: int) -> set[str]:
        """Returns the parameters that clients neither train nor send in a round."""
        return self.phases[attempt % len(self.phases)]

    def upload_of(self, group: Group, attempt: int) -> Codec:
        """Returns the codec of a group's uploads in a round."""
        return self._uploads[attempt % len(self._uploads)] if group is self.weights else group.upload

    def registered(self, examples: Examples, key: Key) -> Registered:
        """Returns the numbers that the server registers for a client in a round; `key` is the client's key."""
        used, limit = examples.y, self.training.max_examples
        if limit and limit < len(used):
            used = used[torch.from_numpy(self.training.chosen(len(used), key.fold("train"))).to(used.device)]
        return Registered(len(used), self.task.count(used))
