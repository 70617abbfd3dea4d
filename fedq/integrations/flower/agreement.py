"""What a node learns at first contact: the schema, both encoders and the seed, in one message of JSON."""

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fedq.encoding
from fedq.encoding import Key, MessageError, StateDictEncoder, TensorSpec
from fedq.encoding import message as frame
from fedq.encoding.schema import Schema
from fedq.keys import BROADCAST
from fedq.learning.checks import check_directions, check_feedback
from fedq.learning.error_feedback import Direction, ErrorFeedback
from fedq.learning.group import Group
from fedq.learning.protocol import EXACT

_FINGERPRINT = b"contact1"

_CLASSES: dict[str, type] = {
    name: part
    for name in fedq.encoding.__all__
    if isinstance(part := getattr(fedq.encoding, name), type) and dataclasses.is_dataclass(part)
} | {"ErrorFeedback": ErrorFeedback}
"""The classes that a node builds from a message. A message cannot name any other class."""

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Agreement:
    """What both sides of a link hold: the encoders of both directions, bound to the schema of the weights.

    seed: The seed of all random draws.
    group: The codecs of both directions.
    exact: The codec of an exact message of the weights.
    reference: The reference of the broadcast, if it compresses any tensor; else "none".
    broadcast_feedback: Whether the server keeps a residual.
    upload_feedback: Whether nodes keep a residual.
    exact_both_ways: The names of tensors that travel exact in both directions.
    contact: The bytes from which `read` makes the same agreement.
    """

    def __init__(self, schema: Schema, broadcast: Direction, upload: Direction, seed: int) -> None:
        """Raises FedqError if the encoders do not fit each other, or do not fit this schema."""
        check_directions(broadcast, upload)
        self.broadcast_feedback = isinstance(broadcast, ErrorFeedback)
        self.upload_feedback = isinstance(upload, ErrorFeedback)
        down, up = (way.encoder if isinstance(way, ErrorFeedback) else way for way in (broadcast, upload))
        self.seed, self.group, self.exact = seed, Group.of(schema, down, up), EXACT.bind(schema)
        for way, direction, encoder in (("broadcast", broadcast, down), ("upload", upload, up)):
            if isinstance(direction, ErrorFeedback):
                check_feedback(way, encoder.bind(schema), Key(seed).fold("check"))
        self.reference = down.reference if self.group.broadcast.sends_differences else "none"
        compressed = {*self.group.broadcast.compressed, *self.group.upload.compressed}
        self.exact_both_ways = schema.keys() - compressed
        content = {
            "fedq": _version(),
            "seed": seed,
            "schema": [[name, list(spec.shape), str(spec.dtype)] for name, spec in schema.items()],
            "broadcast": _to_json(broadcast),
            "upload": _to_json(upload),
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        self.contact = frame.pack([text], _FINGERPRINT, Key(seed, 0, BROADCAST))

    @classmethod
    def read(cls, contact: bytes, broadcast: Direction | None = None, upload: Direction | None = None) -> "Agreement":
        """Returns the agreement of a server.

        contact: Any bytes.
        broadcast: The broadcast's encoder; None for the encoder that the server sends.
        upload: The upload's encoder; None for the encoder that the server sends.

        Raises MessageError for damaged bytes and for unknown classes, FedqError if the encoders do not fit each other.
        """
        reader = frame.unpack(contact, _FINGERPRINT, frame.peek(contact)[1])
        content: dict[str, Any] = {}
        try:
            content = json.loads(bytes(reader.read(len(contact) - frame.OVERHEAD)))
            schema = {
                str(name): TensorSpec(tuple(map(int, shape)), _DTYPES[dtype])
                for name, shape, dtype in content["schema"]
            }
            if any(size < 0 for spec in schema.values() for size in spec.shape):
                raise ValueError("a shape has a negative size")
            down = broadcast or _direction(_from_json(content["broadcast"]))
            up = upload or _direction(_from_json(content["upload"]))
            for way, direction in (("broadcast", down), ("upload", up)):
                if json.loads(json.dumps(_to_json(direction))) != content[way]:
                    raise ValueError(f"compression({way}=…) of this node is not the {way} of the server's Compressed")
            return cls(schema, down, up, int(content["seed"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            theirs = content.get("fedq") if isinstance(content, dict) else None
            raise MessageError(
                f"the server's encoders cannot be built here: {_sentence(error)}; "
                f"the server has fedq {theirs}, this node {_version()}"
            ) from error


def _to_json(part: Any) -> Any:
    """Returns an encoder as plain values, without arguments that have their default."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        kind = type(part)
        known = _CLASSES.get(kind.__name__) is kind
        fields = [field for field in dataclasses.fields(part) if field.init]
        values = {field.name: getattr(part, field.name) for field in fields}
        sent = {field.name: _to_json(values[field.name]) for field in fields if values[field.name] != field.default}
        return {"": kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}", **sent}
    if isinstance(part, Mapping):
        return {"": "dict", "items": [[key, _to_json(value)] for key, value in part.items()]}
    if isinstance(part, list | tuple):
        return [_to_json(value) for value in part]
    if isinstance(part, torch.dtype):
        return {"": "dtype", "name": str(part)}
    if isinstance(part, float):
        return float(part)  # numpy's floats have another repr
    return part


def _from_json(node: Any) -> Any:
    """Returns the encoder that `_to_json` wrote. Raises ValueError, TypeError or KeyError for other values."""
    if isinstance(node, list):
        return tuple(map(_from_json, node))
    if not isinstance(node, dict):
        return node
    kind, *names = node
    name = node[kind]
    if name == "dict":
        return {key: _from_json(value) for key, value in node["items"]}
    if name == "dtype":
        return _DTYPES[node["name"]]
    if name not in _CLASSES:
        raise ValueError(f"there is no class {name!r}, and compression() got no encoder with this class")
    return _CLASSES[name](**{name: _from_json(node[name]) for name in names})


def _direction(part: Any) -> Direction:
    if not isinstance(part, StateDictEncoder | ErrorFeedback):
        raise TypeError(f"{type(part).__name__} is not a StateDictEncoder")
    return part


def _sentence(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _version() -> str:
    try:
        return version("fedq")
    except PackageNotFoundError:  # a checkout on the path
        return "of a checkout"
