"""The node's side of compression: a mod of Flower's ClientApp."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from fedq.encoding import EncodeError, Key, MessageError
from fedq.encoding import message as frame
from fedq.encoding.schema import Tensors, schema_of
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
    unpacked,
)
from fedq.learning.error_feedback import Direction, compensate, residual_of
from fedq.learning.group import upload_params

_STATE, _RESIDUAL = "fedq", "fedq.residual"


class _Received(NamedTuple):
    """What a node receives.

    name: The name of the record of weights.
    agreement: What both sides agree on.
    key: The key of the broadcast.
    weights: The decoded weights.
    params: The params of the upload's adaptive parts.
    """

    name: str
    agreement: Agreement
    key: Key
    weights: dict[str, Tensor]
    params: dict[str, Tensor]


def compression(upload: Direction | None = None, broadcast: Direction | None = None, loss: str = "train_loss") -> Mod:
    """Returns the mod for `ClientApp(mods=[compression()])`; the server's strategy is `Compressed`.

    The app sees weights as before. The network sees messages of fedq. A message that cannot be used is answered with
    an error of one sentence, and the app is not called.

    upload: The encoder of the node's updates. None takes the encoder that the server sends. An encoder with a class of
        your own must be given on both sides.
    broadcast: The encoder of the server's weights; the same rules apply.
    loss: The name of the training loss among the metrics of the app's reply, for rate control that follows the loss.
    """
    read = lru_cache(maxsize=8)(lambda contact: Agreement.read(contact, broadcast, upload))

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if not (message.has_content() and message.content.array_records):
            return call_next(message, context)
        try:
            received = _receive(message.content, context, read)
        except FedqError as error:
            return refusal(error, message)
        message.content = replaced(message.content, received.name, as_record(received.weights))
        reply = call_next(message, context)
        if not reply.has_content() or message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
            return reply
        try:
            reply.content = _answer(reply.content, received, context, loss)
        except FedqError as error:
            return refusal(error, message)
        return reply

    return mod


def _receive(content: RecordDict, context: Context, read: Callable[[bytes], Agreement]) -> _Received:
    """Decodes the weights of a message. Keeps in the node's state what the next message builds on.

    Raises FedqError for a message that cannot be used.
    """
    records = content.array_records
    if len(records) > 1:
        raise MessageError(f"a message has one record of weights, this one has {len(records)}")
    ((name, record),) = records.items()
    messages = unpacked(record)
    message, contact = messages.pop(MESSAGE, b""), messages.pop(CONTACT, b"")
    exact = messages.pop(REFERENCE, b"")
    if messages or not message:
        raise MessageError("the record of weights has no message of fedq: wrap the server's strategy in Compressed(…)")
    state = context.state.config_records.get(_STATE, ConfigRecord())
    known = state.get("contact")
    contact = contact or (known if isinstance(known, bytes) else b"")
    if not contact:
        raise FedqError("this node has no state of this run: the server must send the first contact again")
    agreement = read(contact)
    key = Key(agreement.seed, frame.peek(message)[1].round)
    reference: Tensors | None = None
    if exact:
        reference = agreement.exact.decode(exact, key).tensors
    elif agreement.reference != "none" and REFERENCE in context.state.array_records:
        reference = as_tensors(context.state.array_records[REFERENCE])
    if agreement.reference != "none" and reference is None:
        raise FedqError("this node does not hold the weights on which the message builds")
    weights, attached = agreement.group.broadcast.decode(message, key, reference=reference)
    if known != contact:
        context.state[_STATE] = ConfigRecord({"contact": contact})
    if agreement.reference == "last":
        context.state[REFERENCE] = as_record(weights)
    elif agreement.reference == "initial" and exact:
        context.state[REFERENCE] = as_record(reference or {})
    return _Received(name, agreement, key, weights, upload_params(attached))


def _answer(content: RecordDict, received: _Received, context: Context, loss_name: str) -> RecordDict:
    """Returns the app's reply with the update as a message in the place of the trained weights.

    Raises FedqError for a reply that cannot be sent.
    """
    agreement, codec = received.agreement, received.agreement.group.upload
    if len(content.array_records) != 1:
        raise FedqError(f"the app's reply must hold one record of weights, not {len(content.array_records)}")
    ((name, record),) = content.array_records.items()
    trained, schema = as_tensors(record), codec.schema
    if (found := schema_of(trained)) != schema:
        wrong = next(n for n in (*schema, *found) if found.get(n) != schema.get(n))
        raise FedqError(f"the app received {wrong!r} as {schema.get(wrong)}, but replies with {found.get(wrong)}")
    update = {
        name: value - received.weights[name]
        if value.is_floating_point() and name not in agreement.exact_both_ways
        else value
        for name, value in ((name, trained[name]) for name in schema)
    }
    if agreement.upload_feedback and _RESIDUAL in context.state.array_records:
        update = compensate(update, as_tensors(context.state.array_records[_RESIDUAL]))
    key, loss = received.key._replace(client=context.node_id), _metric(content, loss_name)
    try:
        message = codec.encode(update, key, received.params, loss=loss).message
    except TypeError as error:
        if loss is None:
            raise EncodeError(
                f"the upload follows the training loss, but the reply has no metric {loss_name!r}"
            ) from error
        raise
    if agreement.upload_feedback:
        decoded = codec.decode(message, key, received.params).tensors
        context.state[_RESIDUAL] = as_record(residual_of(codec, update, decoded))
    return replaced(content, name, packed({MESSAGE: message}))


def _metric(content: RecordDict, name: str) -> float | None:
    values = [record[name] for record in content.metric_records.values() if name in record]
    return float(values[0]) if values and isinstance(values[0], int | float) else None
