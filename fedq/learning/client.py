"""The client's half of a round: bytes in, bytes out."""

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from fedq.data import Examples
from fedq.encoding import Codec, EncodeError, Key
from fedq.encoding.numerics import is_finite
from fedq.encoding.schema import Tensors
from fedq.errors import FedqError
from fedq.keys import BROADCAST
from fedq.learning.draws import KeyedDraws
from fedq.learning.error_feedback import compensate, residual_of
from fedq.learning.failures import ClientFailure, SharedDraw, unable
from fedq.learning.local_training import LocalTraining, Precision, TrainingMetrics, update_of
from fedq.learning.optimizers import PREFIX
from fedq.learning.parts import checksum, copied, same_bits
from fedq.learning.protocol import Protocol
from fedq.learning.round import Answer, Received, timed
from fedq.learning.task import TaskError

T = TypeVar("T")


class ClientHalf:
    """Trains on a client's examples and encodes the update.

    The half holds the protocol, which follows from the configuration and the seed. A client's own state is an argument
    (`kept`) and a part of the answer (`to_keep`). So one half serves many clients, in several threads.
    """

    def __init__(self, protocol: Protocol, precision: Precision = "float32") -> None:
        """Raises FedqError if the upload cannot send structured updates without loss.

        protocol: What both halves agree on.
        precision: The precision of forward and backward passes.
        """
        self.protocol, self._precision = protocol, precision
        self._local = threading.local()
        self.keyed: bool | None = None  # whether the model draws in training; None before the first client
        buffers, saved = dict(protocol.client_model.named_buffers()), protocol.client_model.state_dict()
        self._unsaved = {name: value for name, value in buffers.items() if name not in saved}
        if protocol.projection:
            _check_projection(protocol, protocol.projection)

    def answer(
        self, received: Received, client: int, examples: Examples, kept: Tensors, seconds: dict[str, float]
    ) -> Answer:
        """Returns the client's answer to a broadcast.

        received: What the broadcast decodes to.
        client: The client's number.
        examples: The client's examples.
        kept: The tensors in the client's store, of the protocol's `kept_schema`; empty before the first answer.
        seconds: The seconds of each phase; the method adds its own.

        Raises ClientFailure if training fails, EncodeError if the update cannot be encoded.
        """
        protocol, key = self.protocol, Key(self.protocol.seed, received.attempt, client)
        params, training = received.upload_params, protocol.training.at(received.attempt)
        to_keep = {name: value for name, value in kept.items() if name.startswith(PREFIX)}
        with timed(seconds, "train"):
            trained, metrics = self._trained(received, training, examples, kept, to_keep, key)
            update = update_of({name: trained[name] for name in received.weights}, received.weights)
        with timed(seconds, "encode"):
            uploads: dict[str, dict[str, Tensor]] = {}
            if protocol.initial_groups:
                uploads = protocol.algorithm.upload(update, metrics.steps, training, received, kept)
            if protocol.upload_feedback:
                update = compensate(update, kept)
            loss = protocol.task.metrics(metrics.sums)["loss"]
            messages: list[bytes] = []
            for name, group in protocol.groups.items():
                codec, tensors = protocol.upload_of(group, received.attempt), uploads.get(name, update)
                tensors = {own: tensors[own] for own in codec.schema}
                messages.append(codec.encode(tensors, key, params, loss=loss).message)
            report = protocol.reports.write(metrics, key)
        for name in protocol.parts.personal:
            if not is_finite(trained[name]):
                raise EncodeError(f"tensor {name!r} holds NaN or infinity and is not kept")
            to_keep[name] = trained[name].detach().clone()
        if protocol.kept_schema.keys() - to_keep.keys():
            decoded: dict[str, Tensor] = {}
            # the client decodes its own messages, to keep state that follows what the server decodes
            with timed(seconds, "decode"):
                for group, message in zip(protocol.groups.values(), messages, strict=True):
                    decoded |= group.upload.decode(message, key, params, device=protocol.device).tensors
            with timed(seconds, "encode"):
                if protocol.upload_feedback:
                    to_keep |= residual_of(protocol.weights.upload, update, decoded)
                groups = {name: decoded[name] for name in protocol.initial_groups}
                to_keep |= protocol.algorithm.keep(groups, kept)
        if lacking := [name for name in protocol.kept_schema if name not in to_keep]:
            raise FedqError(f"client.keep_optimizer must be false: training has no gradient for {lacking[0]!r}")
        # in the schema's order and contiguous, as a file gives them: all kinds of store give the same tensors
        to_keep = {name: to_keep[name].contiguous().cpu() for name in protocol.kept_schema}
        return Answer(messages, report, to_keep)

    def _trained(
        self,
        received: Received,
        training: LocalTraining,
        examples: Examples,
        kept: Tensors,
        optimizer: dict[str, Tensor],
        key: Key,
    ) -> tuple[dict[str, Tensor], TrainingMetrics]:
        """Returns the trained model's state_dict, and replaces the tensors in `optimizer`.

        Raises ClientFailure for any error of the data or the model. Raises FedqError if training changes a frozen
        tensor, or the shape or dtype of any tensor.
        """
        protocol = self.protocol
        if not len(examples.y):
            raise ClientFailure("unable", "it has no examples")
        model, start = self._worker_model(), protocol.start(received.weights, kept, key)
        if len(protocol.phases) > 1:
            resting = protocol.resting(received.attempt)
            for name in protocol.parameters:
                model.get_parameter(name).requires_grad_(name not in resting)
        project = correct = None
        if protocol.projection:
            project = partial(_project, protocol.projection, received.weights, key, received.upload_params)
        if protocol.initial_groups:
            correct = partial(_correct, protocol, received, kept)
        # the mode slows each function of torch, and a model without draws does not need the mode
        draws = nullcontext() if self.keyed is False else KeyedDraws(key.fold("draws"), protocol.device)
        try:
            with draws:
                metrics = training.train(
                    model,
                    start,
                    examples,
                    key.fold("train"),
                    project,
                    self._precision,
                    correct,
                    protocol.task,
                    optimizer if training.keep_optimizer else None,
                )
        except TaskError as error:
            raise TaskError(f"with the examples of client {key.client}: {error}") from error
        except (FedqError, ClientFailure):
            raise
        except Exception as error:
            raise unable(error) from error
        if isinstance(draws, KeyedDraws):
            self.keyed = self.keyed or draws.drawn
        if not metrics.sums["targets"]:
            raise ClientFailure("unable", "no target of the client's examples counts")
        trained = model.state_dict()
        for name, value in start.items():
            after = trained.get(name)
            if not isinstance(after, Tensor) or after.shape != value.shape or after.dtype != value.dtype:
                raise FedqError(
                    f"model: training changes the shape or dtype of {name!r}, so that it cannot be averaged"
                )
        for name in protocol.parts.frozen:
            shared = protocol.shared.get(name)
            if not same_bits(trained[name], start[name]) if shared is None else shared != checksum(trained[name]):
                raise FedqError(f"model: training changes {name!r}, which is frozen and is not sent")
        return trained, metrics

    def with_keyed_draws(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`. Repeats `work` if a client's model is the first that draws random numbers."""
        try:
            return work()
        except SharedDraw:
            if self.keyed:
                raise
            self.keyed = True
        return work()

    def _worker_model(self) -> nn.Module:
        """Returns the calling thread's copy of the model, in the state before its first client.

        Training loads the weights later. Attributes, such as a counter, and buffers outside the state_dict have their
        first values.
        """
        local, first = self._local, self.protocol.client_model
        if not hasattr(local, "model"):
            local.model = (deepcopy if self.protocol.submodels else copied)(first)
            local.parts = {  # attributes of the copy refer to the copy's modules and tensors
                id(part): copy
                for parts in ("modules", "parameters", "buffers")
                for part, copy in zip(getattr(first, parts)(), getattr(local.model, parts)(), strict=True)
            }
            local.attributes = [
                {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
                for module in first.modules()
            ]
            # most attributes, such as sizes, cannot change in place: a copy is the object itself
            local.mutable = [
                {name: value for name, value in attributes.items() if copy[name] is not value}
                for attributes, copy in zip(local.attributes, deepcopy(local.attributes, {**local.parts}), strict=True)
            ]
        model: nn.Module = local.model
        copies = deepcopy(local.mutable, {**local.parts})
        for module, attributes, mutable in zip(model.modules(), local.attributes, copies, strict=True):
            for name in vars(module).keys() - attributes.keys() - _OF_TORCH:
                delattr(module, name)
            vars(module).update(attributes, **mutable)
        for name, value in self._unsaved.items():
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, value.clone())
        return model


_OF_TORCH = nn.Module().__dict__.keys() - {"training"}


def _correct(
    protocol: Protocol, received: Received, kept: Tensors, gradients: Tensors, weights: Mapping[str, Tensor]
) -> None:
    """Lets the algorithm correct the gradients of parameters that travel."""
    shared = {name: gradients[name] for name in protocol.parameters if name in gradients}
    protocol.algorithm.correct(shared, {name: weights[name] for name in shared}, received, kept)


def _project(
    codec: Codec, weights: Tensors, key: Key, params: Tensors, gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns what the server would decode from `gradients`. `weights` stand for the other tensors of the schema."""
    sent = {name: gradients.get(name, value) for name, value in weights.items()}
    message = codec.encode(sent, key, params, loss=0.0).message
    decoded, _ = codec.decode(message, key, params, device=next(iter(weights.values())).device)
    return {name: decoded[name] for name in weights if name in gradients}


def _check_projection(protocol: Protocol, codec: Codec) -> None:
    """Raises FedqError unless the upload sends the sum of two structured steps without loss."""
    params = codec.adaptation.params(codec.adaptation.initial_state())
    project = partial(
        _project, codec, protocol.parts.travelling(protocol.initial), Key(protocol.seed, client=BROADCAST), params
    )
    steps = {name: protocol.initial[name] for name in protocol.parameters}
    first, second = project(steps), project({name: step.roll(1) for name, step in steps.items()})
    total = {name: first[name] + second[name] for name in steps}
    for name, again in project(total).items():
        if float((again - total[name]).norm()) > 1e-3 * float(total[name].norm()):
            raise FedqError(
                f"client.structured: the upload of {name!r} is not a projection: it needs a chain such as RandomMask "
                "or RandomSubspace without scale, and no lossy stage after it"
            )
