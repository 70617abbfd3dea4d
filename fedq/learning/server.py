"""The server's half of a round: it opens the broadcast, reads the answers, adds them up and closes the round."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedq.encoding import Key, MessageError
from fedq.encoding.numerics import is_finite
from fedq.learning.error_feedback import compensate
from fedq.learning.group import attach
from fedq.learning.guard import NormGuard, norm
from fedq.learning.optimizers import Scheduled
from fedq.learning.protocol import Protocol
from fedq.learning.round import Answer, Broadcast, ClientRecord, Received, Registered, Summand, timed
from fedq.learning.state import ServerState

ServerOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
"""Builds the server optimizer for the given parameters, as `functools.partial(torch.optim.Adam, lr=0.01)` does."""


class Downlink:
    """Encodes what the server sends."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol

    def open(self, state: ServerState, clients: Iterable[int]) -> tuple[Broadcast, dict[str, Tensor]]:
        """Returns a round's broadcast to a cohort, and its reports to the broadcast's adaptive parts.

        Raises EncodeError for weights that cannot be sent.
        """
        protocol = self._protocol
        key = Key(protocol.seed, state.attempt)
        reference = state.received or protocol.initial
        messages: list[bytes] = []
        reports: dict[str, Tensor] = {}
        for group in protocol.groups.values():
            codec, tensors = group.broadcast, state.groups
            if group is protocol.weights:
                codec = protocol.to_all
                tensors = compensate(state.weights, state.residual) if state.residual else state.weights
            down: dict[str, Tensor] = {}
            attached: dict[str, Tensor] = {}
            if group.adaptive:
                down = group.broadcast.adaptation.params(state.broadcast)
                attached = attach(down, group.upload.adaptation.params(state.upload))
            tensors = {name: tensors[name] for name in codec.schema}
            encoded = codec.encode(tensors, key, down, attached=attached, reference=reference)
            messages.append(encoded.message)
            if group.adaptive:
                reports |= group.broadcast.adaptation.as_cohort(encoded.reports)
        broadcast = Broadcast(state.attempt, messages, state.norm)
        if protocol.follows:
            all_at_once = protocol.exact.encode(protocol.parts.travelling(reference), key).message
            missed = {client: state.missed(client) for client in clients}
            broadcast = broadcast._replace(
                all_at_once=all_at_once, kept=[bytes(k.numpy()) for k in state.kept], missed=missed
            )
        return broadcast, reports

    def messages(self, broadcast: Broadcast, client: int) -> list[bytes]:
        """Returns the messages for one client: those that it missed, or all weights at once, then this round's."""
        missed = broadcast.missed.get(client, 0)
        if missed < 0:
            return [broadcast.all_at_once, *broadcast.messages]
        return [*broadcast.kept[len(broadcast.kept) - missed :], *broadcast.messages]

    def with_base(self, broadcast: Broadcast, messages: list[bytes]) -> list[bytes]:
        """Returns the messages for a client that raised OtherBase: the base, all weights at once, then this round's.

        messages: The messages that the client could not read.
        """
        at_once = [broadcast.all_at_once] if broadcast.all_at_once else []
        return [self._protocol.write_base(broadcast.attempt), *at_once, *messages[-len(self._protocol.groups) :]]

    def part(self, received: Received, client: int) -> tuple[bytes, dict[str, Tensor]]:
        """Returns a client's own message with its sub-model, for federated dropout, and the reports of its encoding.

        `received` is the whole model as the server opened it.
        """
        protocol, codec = self._protocol, self._protocol.weights.broadcast
        assert protocol.submodels is not None  # for the type checker: only federated dropout calls this
        key = Key(protocol.seed, received.attempt, client)
        units = protocol.submodels.drawn(key)
        encoded = codec.encode(
            protocol.submodels.cut(received.weights, units),
            key.fold("broadcast"),  # shares no random draw with the upload
            received.params,
            attached=received.params,
            reference=protocol.submodels.cut(protocol.initial, units),
        )
        return encoded.message, codec.adaptation.as_cohort(encoded.reports)


class Uplink:
    """Reads clients' answers, one by one, and adds them up."""

    def __init__(self, protocol: Protocol, guard: NormGuard | None) -> None:
        """guard: Clips or drops updates whose norm is out of line; None for no limit."""
        self._protocol, self.guard = protocol, guard
        self._stop_at_sum = protocol.algorithm.sums_updates and not protocol.submodels

    def open(
        self, answer: Answer, received: Received, registered: Registered, estimate: float, record: ClientRecord
    ) -> Summand:
        """Returns the summand of an answer, and writes the client's weight, norm and metrics to `record`.

        answer: The bytes that the server received.
        received: The client's decoded broadcast.
        registered: The registered numbers of the client, from which the weight follows; a report cannot change the
            weight.
        estimate: The norm guard's estimate.
        record: The client's record.

        Raises MessageError for bytes that are not of this round and client, ClientFailure for an outlier.
        """
        protocol, key = self._protocol, Key(self._protocol.seed, received.attempt, record.client)
        updates: dict[str, dict[str, Tensor]] = {}
        reports: dict[str, Tensor] = {}
        with timed(record.seconds, "decode"):
            if len(answer.messages) != len(protocol.groups):
                raise MessageError(f"an answer has {len(protocol.groups)} messages, this one {len(answer.messages)}")
            for (name, group), message in zip(protocol.groups.items(), answer.messages, strict=True):
                updates[name], attached = protocol.upload_of(group, received.attempt).decode(
                    message, key, received.upload_params, device=protocol.device, stop_at_sum=self._stop_at_sum
                )
                if attached:
                    reports |= group.upload.adaptation.as_cohort(attached)
            record.training = protocol.reports.read(answer.report, key, registered)
        with timed(record.seconds, "aggregate"):
            if self.guard:
                record.norm = math.hypot(*map(norm, updates.values()))
            scale = self.guard.scale(record.norm, estimate) if self.guard and record.norm is not None else 1.0
            training = protocol.training.at(received.attempt)
            weight = {"examples": registered.examples, "targets": registered.targets, "uniform": 1}[training.weight]
            weight, factor, sums = protocol.algorithm.weigh(weight, training, record.training)
            record.weight = weight
            update, its_scale = updates.pop("weights"), scale
            if not protocol.algorithm.sums_updates:
                scaled = {
                    name: value.mul_(scale) if value.is_floating_point() else value for name, value in update.items()
                }
                update, its_scale = protocol.algorithm.to_sum(scaled, received.weights), 1.0
            total = weighted(update, received.weights, weight, its_scale)
            if factor != 1.0:
                scale_parameters(protocol, total, factor)
            for name, value in total.items():
                if not is_finite(value):
                    raise MessageError(f"tensor {name!r} times {weight} overflows {value.dtype}")
            if protocol.submodels:
                total = protocol.submodels.whole(total, protocol.submodels.drawn(key))
            for update in updates.values():
                total |= weighted(update, {}, 1, scale)
            return Summand(weight, total, reports, {}, dict(sums))

    def add(self, left: Summand, right: Summand) -> Summand:
        """Returns the sum of two summands, in the memory of `left`."""
        reports: dict[str, Tensor] = {}
        broadcast_reports: dict[str, Tensor] = {}
        for group in self._protocol.groups.values():
            if left.reports:
                reports |= group.upload.adaptation.combine(left.reports, right.reports)
            if left.broadcast_reports:
                combine = group.broadcast.adaptation.combine
                broadcast_reports |= combine(left.broadcast_reports, right.broadcast_reports)
        return Summand(
            left.weight + right.weight,
            {name: value.add_(right.update[name]) for name, value in left.update.items()},
            reports,
            broadcast_reports,
            {name: value + right.sums[name] for name, value in left.sums.items()},
        )

    def close(self, total: Summand, state: ServerState) -> dict[str, Tensor]:
        """Returns the decoded sums of all groups; may reuse `total`. Raises MessageError if a sum overflows."""
        protocol, key = self._protocol, Key(self._protocol.seed, state.attempt)
        sums: dict[str, Tensor] = {}
        if not self._stop_at_sum:  # each update was decoded alone
            update = protocol.algorithm.from_sum(total.update, total.weight, state.weights)
            sums = protocol.exact.decode_sum(update, key, {})
        else:
            for group in protocol.groups.values():
                params = group.upload.adaptation.params(state.upload) if group.adaptive else {}
                sums |= protocol.upload_of(group, state.attempt).decode_sum(total.update, key, params)
        if total.sums:
            scale_parameters(protocol, sums, protocol.algorithm.rescale(total.sums, total.weight))
        return sums


def scale_parameters(protocol: Protocol, tensors: Mapping[str, Tensor], factor: float) -> None:
    """Multiplies the updates of the model's parameters by `factor`, in place."""
    others = protocol.initial.keys() - set(protocol.parameters) | protocol.initial_groups.keys()
    for name in tensors.keys() - others:
        tensors[name].mul_(factor)


_LOW = 31  # bits of the lower part of an integer in a sum


def weighted(
    update: Mapping[str, Tensor], weights: Mapping[str, Tensor], weight: int, scale: float = 1.0
) -> dict[str, Tensor]:
    """Returns a client's update times its weight, for the sum over clients. May reuse the memory of `update`.

    update: The update, as `local_training.update_of` returns it.
    weights: The weights that the client received.
    weight: The client's weight.
    scale: Another factor for floating tensors.

    Floating tensors narrower than float32 become float32, because their sum could overflow. Integers and booleans
    become their change from `weights`, so that sums are exact: an upper and a lower part along a new last dimension, in
    int64. Raises MessageError for a change of 2^62 or more.
    """
    total = {}
    for name, value in update.items():
        if value.is_floating_point():
            total[name] = value.to(torch.promote_types(value.dtype, torch.float32)).mul_(weight * scale)
            continue
        if bool(((value.double() - weights[name].double()).abs() >= 2.0**62).any()):
            raise MessageError(f"tensor {name!r} changes by 2^62 or more: its mean would not be exact")
        change = value.to(torch.int64) - weights[name].to(torch.int64)
        total[name] = torch.stack((change >> _LOW, change & ((1 << _LOW) - 1)), -1) * weight
    return total


def server_step(
    build: ServerOptimizer,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    parameters: frozenset[str],
    total: Mapping[str, Tensor],
    weight: int | float | Mapping[str, Tensor],
    round: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the next weights and optimizer state.

    total: The weighted sum of updates; its memory is reused. Parameters that are absent keep their values.
    weight: The sum of the weights, or a tensor of sums for each name if coordinates have different clients.
    round: The number of the round, from 0, for the learning rate.

    The mean goes to the optimizer as a negative gradient of the `parameters` (Reddi 2021, algorithm 1). Other floating
    tensors (batch norm's running statistics) take the unchanged mean. Integers and booleans take the mean rounded to
    the nearest integer, in exact arithmetic.
    """
    share = weight if isinstance(weight, Mapping) else dict.fromkeys(weights, weight)
    leaves = {name: weights[name].clone().requires_grad_() for name in weights if name in parameters}
    optimizer = build(leaves.values())
    if state:
        optimizer.load_state_dict(deepcopy(dict(state)))
    if isinstance(build, Scheduled):
        for group in optimizer.param_groups:
            group["lr"] = build.rate(round)
    for name, leaf in leaves.items():
        if name not in total:  # the parameter rests in this round
            continue
        leaf.grad = total[name].div_(-share[name]).to(leaf.dtype)
    optimizer.step()
    after = {}
    for name, value in weights.items():
        if name in leaves:
            after[name] = leaves[name].detach()
        elif value.is_floating_point():
            after[name] = value + (total[name] / share[name]).to(value.dtype)
        else:
            upper, lower = total[name].unbind(-1)
            whole = torch.div(upper, share[name], rounding_mode="floor")
            rest = ((upper - whole * share[name]) << _LOW) + lower
            nearest = (whole << _LOW) + torch.div(2 * rest + share[name], 2 * share[name], rounding_mode="floor")
            after[name] = (value.to(torch.int64) + nearest).to(value.dtype)
    return after, optimizer.state_dict()


def stepped(
    protocol: Protocol,
    build: ServerOptimizer,
    state: ServerState,
    sums: dict[str, Tensor],
    weight: int,
    usable: Sequence[ClientRecord],
    population: int | None,
) -> ServerState:
    """Returns the state after the server optimizer's step on the weights, and the algorithm's step on the groups.

    build: Builds the server optimizer.
    state: The state, with the round counted.
    sums: The sums over clients, of all groups.
    weight: The sum of the clients' weights.
    usable: The records of the clients whose answers were added up.
    population: The number of all clients; None for the number in `usable`.
    """
    total: int | Mapping[str, Tensor] = weight
    if protocol.submodels:  # the mean of a coordinate is over the clients whose sub-model has the coordinate
        key = Key(protocol.seed, state.attempt - 1)
        total = protocol.submodels.weights((key._replace(client=r.client), r.weight) for r in usable)
    before = protocol.parts.travelling(state.weights)
    weights, optimizer = server_step(
        build,
        state.optimizer,
        before,
        frozenset(protocol.parameters),
        sums,
        total,
        round=state.attempt - 1,
    )
    means = {name: sums[name] / len(usable) for name in state.groups}
    share = len(usable) / (population or len(usable))
    return replace(
        state,
        weights=protocol.parts.with_ties(state.weights | weights),
        optimizer=optimizer,
        groups=protocol.algorithm.step(state.groups, means, share) if means else {},
    )


def adapted(
    protocol: Protocol, state: ServerState, broadcast_reports: dict[str, Tensor], upload_reports: dict[str, Tensor]
) -> ServerState:
    """Returns the state with the adaptive parts of both directions after the round."""
    broadcast: dict[str, Tensor] = {}
    upload: dict[str, Tensor] = {}
    for group in protocol.groups.values():
        broadcast |= group.broadcast.adaptation.update_state(state.broadcast, broadcast_reports)
        upload |= group.upload.adaptation.update_state(state.upload, upload_reports)
    return replace(state, broadcast=broadcast, upload=upload)
