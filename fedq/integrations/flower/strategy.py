"""The server's side of compression: a wrapper around any strategy of Flower."""

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor
from typing_extensions import override

from fedq.encoding import Key, MessageError, schema_of
from fedq.encoding.numerics import is_finite
from fedq.errors import FedqError
from fedq.integrations.flower.agreement import Agreement
from fedq.integrations.flower.records import (
    CONTACT,
    MESSAGE,
    REFERENCE,
    as_record,
    as_tensors,
    packed,
    refusal,
    replaced,
    size_of,
    unpacked,
)
from fedq.learning.error_feedback import Direction, compensate, residual_of
from fedq.learning.group import attach


class Compressed(Strategy):
    """Sends the weights of any strategy as messages of fedq, and reads nodes' updates from such messages.

    The nodes' app has the mod `compression`. The strategy sees weights as before: each reply holds the weights of the
    round plus the update that the server decodes. An integer array stays an array of integers: its mean is rounded.

    The metrics of each round get `fedq-bytes-down` and `fedq-bytes-up`: the bytes of all messages, with those of first
    contacts.

    A reply that is damaged, or not of this round and node, becomes an error of one sentence. The strategy leaves this
    reply out. After a failure, the server sends the node everything again.
    """

    def __init__(self, strategy: Strategy, broadcast: Direction, upload: Direction, seed: int = 0) -> None:
        """Wraps a strategy.

        strategy: Any strategy that sends one model to all nodes of a round.
        broadcast: The encoder of the server's weights.
        upload: The encoder of the nodes' updates.
        seed: The seed of random draws, such as rotations.
        """
        self.strategy, self._directions, self._seed = strategy, (broadcast, upload), seed
        self._agreement: Agreement | None = None
        self._number = 0  # the number of broadcasts so far
        self._holds: dict[int, int] = {}  # the last broadcast that each node has answered
        self._asked: dict[int, Message] = {}  # the messages of the open broadcast, by node
        self._name = ""  # the name of the record of weights
        self._weights: dict[str, Tensor] = {}  # the weights of the open broadcast
        self._reference: dict[str, Tensor] = {}
        self._residual: dict[str, Tensor] = {}
        self._states: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})  # adaptive parts: broadcast, upload

    @override
    def summary(self) -> None:
        self.strategy.summary()

    @override
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._encoded(self.strategy.configure_train(server_round, arrays, config, grid))

    @override
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._encoded(self.strategy.configure_evaluate(server_round, arrays, config, grid))

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        bytes_up, opened = 0, []
        reports: dict[str, Tensor] = {}
        adaptation = self._agreement.group.upload.adaptation if self._agreement else None
        for reply in replies:
            if reply.metadata.src_node_id not in self._asked:
                continue
            if reply.has_content():
                bytes_up += sum(map(size_of, reply.content.array_records.values()))
                try:
                    reply, report = self._decoded(reply)
                    if report and adaptation:
                        report = adaptation.as_cohort(report)
                        reports = adaptation.combine(reports, report) if reports else report
                except FedqError as error:
                    reply = refusal(error, self._asked[reply.metadata.src_node_id])
            opened.append(reply)
        self._note(opened)
        if reports and adaptation:
            self._states = self._states[0], adaptation.update_state(self._states[1], reports)
        arrays, metrics = self.strategy.aggregate_train(server_round, opened)
        if arrays is not None:
            arrays = self._in_their_dtypes(arrays)
        return arrays, self._counted(metrics, {"fedq-bytes-up": bytes_up})

    @override
    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        replies = list(replies)
        self._note(replies)
        return self._counted(self.strategy.aggregate_evaluate(server_round, replies), {})

    def _encoded(self, messages: Iterable[Message]) -> list[Message]:
        """Returns the strategy's messages with the weights as messages of fedq.

        Raises FedqError for weights that cannot be sent, and for a strategy that sends several models.
        """
        messages, self._asked = list(messages), {}
        named = [(m, *pair) for m in messages if m.has_content() for pair in m.content.array_records.items()]
        if not named:
            return messages
        _, self._name, first = named[0]
        if len(named) > len(messages) or any((n, r) != (self._name, first) for _, n, r in named if r is not first):
            raise FedqError("Compressed sends one model to all nodes of a round, but the strategy sends several")
        self._weights = as_tensors(first)
        agreement = self._agreed()
        last, self._number = self._number, self._number + 1
        key = Key(self._seed, self._number)
        nodes = [one.metadata.dst_node_id for one, _, _ in named]
        new = [node for node in nodes if node not in self._holds]
        # every node that is not new has the first weights, but may lack the last broadcast
        behind = [n for n in nodes if n in new or (agreement.reference == "last" and self._holds[n] != last)]
        exact = agreement.exact.encode(self._reference, key).message if self._reference and behind else b""
        message = self._encode(agreement, key)
        for one, _, _ in named:
            node = one.metadata.dst_node_id
            contact = {CONTACT: agreement.contact} if node in new else {}
            reference = {REFERENCE: exact} if exact and node in behind else {}
            record = packed({**contact, **reference, MESSAGE: message})
            one.content = replaced(one.content, self._name, record)
            self._asked[node] = one
        return messages

    def _agreed(self) -> Agreement:
        """Returns what both sides agree on, from the first weights. Raises FedqError if the weights' schema changes."""
        schema = schema_of(self._weights)
        if self._agreement is None:
            self._agreement = Agreement(schema, *self._directions, self._seed)
            group = self._agreement.group
            self._states = group.broadcast.adaptation.initial_state(), group.upload.adaptation.initial_state()
            if self._agreement.reference != "none":
                self._reference = self._weights
        elif self._agreement.group.schema != schema:
            raise FedqError("Compressed sends weights of one schema, but the strategy changes names, shapes or dtypes")
        return self._agreement

    def _encode(self, agreement: Agreement, key: Key) -> bytes:
        """Returns the broadcast's message of the weights, and updates what the next broadcast builds on."""
        group, (down, up) = agreement.group, self._states
        params = group.broadcast.adaptation.params(down)
        attached = attach(params, group.upload.adaptation.params(up)) if group.adaptive else {}
        weights = compensate(self._weights, self._residual)
        encoded = group.broadcast.encode(weights, key, params, attached=attached, reference=self._reference)
        if agreement.broadcast_feedback or agreement.reference == "last":
            received = group.broadcast.decode(encoded.message, key, reference=self._reference).tensors
            if agreement.broadcast_feedback:
                self._residual = residual_of(group.broadcast, weights, received)
            if agreement.reference == "last":
                self._reference = received
        reports = group.broadcast.adaptation.as_cohort(encoded.reports)
        self._states = group.broadcast.adaptation.update_state(down, reports), up
        return encoded.message

    def _decoded(self, reply: Message) -> tuple[Message, dict[str, Tensor]]:
        """Returns a reply with weights in the place of the update's message, and its reports to adaptive parts.

        Raises MessageError for a reply that is damaged, or not of this round and node.
        """
        agreement, node = self._agreement, reply.metadata.src_node_id
        messages = [unpacked(record) for record in reply.content.array_records.values()]
        if agreement is None or len(messages) != 1 or messages[0].keys() != {MESSAGE}:
            raise MessageError("the reply holds no message of fedq: add the mod compression() to the node's ClientApp")
        codec, key = agreement.group.upload, Key(self._seed, self._number, node)
        update, reports = codec.decode(messages[0][MESSAGE], key, codec.adaptation.params(self._states[1]))
        weights = {
            name: self._weights[name] + value
            if value.is_floating_point() and name not in agreement.exact_both_ways
            else value
            for name, value in update.items()
        }
        for name, value in weights.items():
            if not is_finite(value):
                raise MessageError(f"tensor {name!r}: the weights plus the update overflow {value.dtype}")
        others = {n: record for n, record in reply.content.items() if n not in reply.content.array_records}
        reply.content = RecordDict({**others, self._name: as_record(weights)})
        return reply, reports

    def _note(self, replies: Iterable[Message]) -> None:
        """Notes which nodes hold the open broadcast. A node without an answer is a new node from now on."""
        for node in self._asked:
            self._holds.pop(node, None)
        self._holds |= {reply.metadata.src_node_id: self._number for reply in replies if not reply.has_error()}

    def _in_their_dtypes(self, arrays: ArrayRecord) -> ArrayRecord:
        """Returns the aggregated arrays in the dtypes of the weights; Flower's mean of integers is a float64."""
        after = {}
        for name, array in arrays.items():
            value, dtype = array.numpy(), self._weights[name].numpy().dtype
            if value.dtype != dtype and dtype.kind in "iu":
                low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
                # float64 rounds the largest int64 up to 2^63, which overflows
                value = np.clip(np.rint(value), low, high if high < 2**53 else np.nextafter(float(high), 0.0))
            elif value.dtype != dtype and dtype.kind == "b":
                value = value >= 0.5
            after[name] = Array(np.asarray(value).astype(dtype))
        return ArrayRecord(after)

    def _counted(self, metrics: MetricRecord | None, more: dict[str, int]) -> MetricRecord | None:
        """Returns a round's metrics with the counted bytes."""
        if metrics is None and not self._asked:
            return None
        sent = (size_of(record) for one in self._asked.values() for record in one.content.array_records.values())
        down = {"fedq-bytes-down": sum(sent)}
        return MetricRecord({**(metrics or {}), **down, **more})
