"""Messages of fedq in the records of Flower."""

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedq.encoding import MessageError
from fedq.encoding.schema import Tensors
from fedq.errors import FedqError

STYPE = "fedq.message"
"""The serialization type of an Array that holds a message. Flower refuses to read it as numbers."""

MESSAGE, CONTACT, REFERENCE = "fedq.message", "fedq.contact", "fedq.reference"
"""The names of a record's arrays: the message; at first contact, what both sides agree on; the reference, exact."""


def packed(messages: Mapping[str, bytes]) -> ArrayRecord:
    """Returns a record of messages by name, each as one array of bytes."""
    return ArrayRecord({name: Array("uint8", (len(data),), STYPE, data) for name, data in messages.items()})


def unpacked(record: ArrayRecord) -> dict[str, bytes]:
    """Returns the messages of a record by name. Raises MessageError for a record that `packed` cannot return."""
    messages = {}
    for name, array in record.items():
        if array.stype != STYPE:
            raise MessageError(f"the array {name[:40]!r} is of type {array.stype[:40]!r}, so it is no message of fedq")
        if array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
            raise MessageError(
                f"the array {name[:40]!r} has {len(array.data)} bytes, but says {array.dtype[:40]} {array.shape}"
            )
        messages[name] = array.data
    return messages


def size_of(record: ArrayRecord) -> int:
    """Returns the number of bytes of a record's messages."""
    return sum(len(array.data) for array in record.values())


def as_record(tensors: Tensors) -> ArrayRecord:
    """Returns tensors as Flower's arrays of numbers."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in tensors.items()})


def as_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Returns the tensors of a record. Raises FedqError, naming the array, if torch cannot read an array."""
    tensors: dict[str, Tensor] = {}
    for name, array in record.items():
        try:
            tensors |= ArrayRecord({name: array}).to_torch_state_dict()
        except Exception as error:  # of numpy's reader or torch, for any bytes
            raise FedqError(f"the array {name[:40]!r} is not a tensor: {error}") from error
    return tensors


def replaced(content: RecordDict, name: str, record: ArrayRecord) -> RecordDict:
    """Returns the content of a message with another record under `name`."""
    return RecordDict({**content, name: record})


def refusal(error: Exception, reply_to: Message) -> Message:
    """Returns an answer that says in one sentence why a message is refused."""
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"fedq: {error}"), reply_to=reply_to)
