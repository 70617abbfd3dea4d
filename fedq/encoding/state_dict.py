"""Which tensor gets which encoder; a state_dict ↔ one message."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedq.encoding import message as frame
from fedq.encoding.encoder import ByStage, Encoder, is_finite, read_exact
from fedq.encoding.message import MessageError
from fedq.encoding.stage import StateUpdate, Tensors, TensorSpec
from fedq.errors import FedqError
from fedq.keys import Key

Schema = Mapping[str, TensorSpec]
"""The names of a state_dict's tensors, in order, with what both sides know of each."""

ByTensor = Mapping[str, ByStage]
"""State, params or updates of all adaptive stages: tensor's name → stage's place in its chain → tensors."""


class EncodeError(FedqError, ValueError):
    """A tensor cannot be sent; names it."""


def schema_of(tensors: Tensors) -> dict[str, TensorSpec]:
    """Returns the schema of a state_dict."""
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def flatten(tensors: ByTensor) -> dict[str, Tensor]:
    """Names each tensor of each adaptive stage `tensor/stage/name`, so that it can be attached to a message."""
    return {
        f"{name}/{stage}/{key}": value
        for name, by_stage in tensors.items()
        for stage, values in by_stage.items()
        for key, value in values.items()
    }


def unflatten(flat: Tensors) -> ByTensor:
    """The inverse of `flatten`."""
    result: dict[str, dict[int, dict[str, Tensor]]] = {}
    for path, value in flat.items():
        name, stage, key = path.rsplit("/", 2)
        result.setdefault(name, {}).setdefault(int(stage), {})[key] = value
    return result


@dataclass(frozen=True)
class StateDictEncoder:
    """Encodes a state_dict into one message, tensor by tensor.

    Floating tensors of more than `threshold` elements go through `encoder`; all others, and every integer or
    boolean tensor, travel exact in their own dtype. `rules` override both: the first pattern (as in a shell) that
    a tensor's name fits gives its encoder.

    The body of a message is: the attached tensors, exact; then a payload a tensor, in the schema's order.
    """

    encoder: Encoder = Encoder()
    threshold: int = 10_000
    rules: Mapping[str, Encoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold must be 0 or more elements, not {self.threshold}")

    def encoder_for(self, name: str, spec: TensorSpec) -> Encoder:
        """Returns the encoder of the tensor called `name`."""
        for pattern, encoder in self.rules.items():
            if fnmatchcase(name, pattern):
                return encoder
        return self.encoder if spec.dtype.is_floating_point and spec.numel > self.threshold else Encoder()

    def initial_state(self, schema: Schema) -> ByTensor:
        """Returns the state of every adaptive stage before the first round."""
        chains = {name: self.encoder_for(name, spec).adaptive() for name, spec in schema.items()}
        return {
            name: {i: stage.initial_state(schema[name]) for i, stage in chain.items()}
            for name, chain in chains.items()
            if chain
        }

    def params(self, schema: Schema, state: ByTensor) -> ByTensor:
        """Returns what the adaptive stages need this round, on both sides."""
        return {
            name: {i: self.encoder_for(name, schema[name]).adaptive()[i].params(own) for i, own in by_stage.items()}
            for name, by_stage in state.items()
        }

    def update_spec(self, schema: Schema) -> dict[str, TensorSpec]:
        """Returns the specs of the state updates that `encode` gives, flattened."""
        return {path: update.spec for path, update in self._updates(schema).items()}

    def combine(self, schema: Schema, left: Tensors, right: Tensors) -> dict[str, Tensor]:
        """Combines two flattened sets of state updates, each of one client (see `report`) or already combined."""
        combine: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "sum": torch.add,
            "min": torch.minimum,
            "max": torch.maximum,
            "stack": lambda a, b: torch.cat((a, b)),
        }
        return {
            path: combine[update.aggregation](left[path], right[path]) for path, update in self._updates(schema).items()
        }

    def report(self, schema: Schema, updates: Tensors) -> dict[str, Tensor]:
        """Returns one client's flattened state updates in the form that `combine` takes."""
        stacked = {path for path, update in self._updates(schema).items() if update.aggregation == "stack"}
        return {path: value[None] if path in stacked else value for path, value in updates.items()}

    def update_state(self, schema: Schema, state: ByTensor, aggregated: Tensors) -> ByTensor:
        """Returns the state of the next round from the combined updates of a cohort of at least one."""
        updates, after = unflatten(aggregated), {}
        for name, by_stage in state.items():
            chain, own_updates = self.encoder_for(name, schema[name]).adaptive(), updates.get(name, {})
            after[name] = {i: chain[i].update_state(own, own_updates.get(i, {})) for i, own in by_stage.items()}
        return after

    def encode(
        self,
        tensors: Tensors,
        key: Key,
        params: ByTensor | None = None,
        attached: Tensors | None = None,
        report: bool = False,
    ) -> tuple[bytes, ByTensor]:
        """Returns the message of a state_dict and the state updates of the adaptive stages.

        `params` are the adaptive stages'. `attached` tensors travel before the payloads; with `report`, so do the
        updates. Raises EncodeError, naming the tensor, for NaN and infinity, which are never sent, and for what a
        stage does not take.
        """
        payloads, updates = [], {}
        for name, tensor in tensors.items():
            tensor = _finite(name, tensor.detach())
            encoder = self.encoder_for(name, TensorSpec.of(tensor))
            try:
                payload, reported = encoder.encode(tensor, key.fold(name), (params or {}).get(name, {}))
            except ValueError as error:
                raise EncodeError(f"tensor {name!r} cannot be encoded: {error}") from error
            payloads += payload
            if reported:
                updates[name] = reported
        front = dict(attached or {}) | (flatten(updates) if report else {})
        exact = Encoder()
        parts = [part for name, tensor in front.items() for part in exact.encode(_finite(name, tensor), key, {})[0]]
        return frame.pack(parts + payloads, self._fingerprint(schema_of(tensors), schema_of(front)), key), updates

    def decode(
        self,
        message: bytes,
        key: Key,
        schema: Schema,
        params: ByTensor | None = None,
        attached: Schema | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the state_dict of `schema` and the attached tensors of the schema `attached`, all finite.

        Without `params` the message is taken to bring them, attached. Raises MessageError, and nothing else, for
        bytes that `encode` with this schema, key and encoder does not make; memory stays within the schema's.
        """
        reader = frame.unpack(message, self._fingerprint(schema, attached or {}), key)
        front, tensors, name = {}, {}, ""
        try:
            for name, spec in (attached or {}).items():
                front[name] = read_exact(reader, spec)
            if params is None:
                own = {f"{name}/{i}" for name, spec in schema.items() for i in self.encoder_for(name, spec).adaptive()}
                params = unflatten({path: t for path, t in front.items() if path.rpartition("/")[0] in own})
            for name, spec in schema.items():
                encoder = self.encoder_for(name, spec)
                tensor = encoder.decode(reader, spec, key.fold(name), params.get(name, {}), torch.device(device))
                if not is_finite(tensor):
                    raise ValueError("a value is NaN or infinite")
                tensors[name] = tensor
            name = "after the last"
            reader.close()
        except ValueError as error:
            raise MessageError(f"tensor {name!r} cannot be decoded: {error}") from error
        return tensors, front

    def _updates(self, schema: Schema) -> dict[str, StateUpdate]:
        return {
            f"{name}/{i}/{update}": value
            for name, spec in schema.items()
            for i, stage in self.encoder_for(name, spec).adaptive().items()
            for update, value in stage.update_spec(spec).items()
        }

    def _fingerprint(self, schema: Schema, attached: Schema) -> bytes:
        """Hashes all that both sides must agree on before they can read each other's messages."""
        agreed = [(name, spec, self.encoder_for(name, spec)) for name, spec in schema.items()]
        return hashlib.blake2b(repr((agreed, list(attached.items()))).encode(), digest_size=8).digest()


def _finite(name: str, tensor: Tensor) -> Tensor:
    """Returns `tensor`; raises EncodeError, naming it, where it holds NaN or infinity."""
    if not is_finite(tensor):
        raise EncodeError(f"tensor {name!r} holds NaN or infinity and is not sent")
    return tensor
