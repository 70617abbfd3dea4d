"""A group of tensors that travel together, and the params that a broadcast attaches."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fedq.encoding import Codec, StateDictEncoder
from fedq.encoding.schema import Schema, Tensors

_UPLOAD = "upload/"  # in front of the names of the upload's params in a broadcast


@dataclass(frozen=True)
class Group:
    """Tensors that travel together, in a message of their own, both ways.

    schema: The tensors' names and specs.
    broadcast: The codec of the server's messages; the params of both directions are attached.
    upload: The codec of the clients' messages; the reports to adaptive parts are attached.
    """

    schema: Schema
    broadcast: Codec
    upload: Codec

    @classmethod
    def of(cls, schema: Schema, down: StateDictEncoder, up: StateDictEncoder, prefix: str = "") -> "Group":
        """Returns the group of tensors of `schema`, with the encoders of both directions."""
        upload = up.bind(schema, reports=True, prefix=prefix)
        params = down.bind(schema, prefix=prefix).adaptation.params_schema
        both = {**params, **{_UPLOAD + path: spec for path, spec in upload.adaptation.params_schema.items()}}
        return cls(schema, down.bind(schema, attached=both, prefix=prefix), upload)

    @cached_property
    def adaptive(self) -> bool:
        """Whether the group has adaptive parts in either direction."""
        return bool(self.broadcast.adaptation.parts or self.upload.adaptation.parts)


def attach(down: Tensors, up: Tensors) -> dict[str, Tensor]:
    """Returns the params of both directions as a broadcast attaches them."""
    return {**down, **{_UPLOAD + path: value for path, value in up.items()}}


def upload_params(attached: Tensors) -> dict[str, Tensor]:
    """Returns the upload's params from what a broadcast attaches."""
    return {path.removeprefix(_UPLOAD): value for path, value in attached.items() if path.startswith(_UPLOAD)}
