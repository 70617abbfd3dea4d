"""Which tensor gets which encoder; a state_dict ↔ one message."""

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedq.encoding import message as frame
from fedq.encoding.adaptive import Adaptive, StateUpdate
from fedq.encoding.encoder import ByPlace, Encoder, described, finite, is_finite, read
from fedq.encoding.message import MessageError
from fedq.encoding.numerics import CHUNK, exact_divide, saturate
from fedq.encoding.rate_control import RateController
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.errors import FedqError
from fedq.keys import Key

Schema = Mapping[str, TensorSpec]
"""The names of a state_dict's tensors, in order, with what both sides know of each."""

ByTensor = Mapping[str, ByPlace]
"""State, params or updates of all that is adaptive: tensor's name → place in its chain → tensors."""

Reference = Literal["none", "initial", "last"]
"""What is subtracted before tensors are encoded: nothing, the run's initial weights, or what was last received."""

JOINT = "*"
"""The name of the vector of all that is encoded as one; no tensor of a module is called so."""

RATE_CONTROL = "*pace"
"""The name under which the state of a direction's rate_control stands among those of tensors."""

_SCALAR = TensorSpec((), torch.float32)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class EncodeError(FedqError, ValueError):
    """A tensor cannot be sent; names it."""


def schema_of(tensors: Tensors) -> dict[str, TensorSpec]:
    """Returns the schema of a state_dict."""
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def flatten(tensors: ByTensor) -> dict[str, Tensor]:
    """Names each tensor of each adaptive stage `tensor/stage/name`, so that it can be attached to a message."""
    flat = {}
    for name, by_stage in tensors.items():
        for stage, values in by_stage.items():
            for key, value in values.items():
                if "/" in key:
                    raise TypeError(f"what a stage calls its params and reports must have no '/', not {key!r}")
                flat[f"{name}/{stage}/{key}"] = value
    return flat


def unflatten(flat: Tensors) -> ByTensor:
    """The inverse of `flatten`."""
    result: dict[str, dict[int, dict[str, Tensor]]] = {}
    for path, value in flat.items():
        name, stage, key = path.rsplit("/", 2)
        result.setdefault(name, {}).setdefault(int(stage), {})[key] = value
    return result


def compensated(tensors: Tensors, residual: Tensors) -> dict[str, Tensor]:
    """Returns the tensors to encode: with the residual of the message before, which is empty before the first."""
    return {name: value + residual[name] if name in residual else value for name, value in tensors.items()}


@dataclass(frozen=True)
class StateDictEncoder:
    """Encodes a state_dict into one message, tensor by tensor.

    Floating tensors of more than `threshold` elements go through `encoder`; all others, and every integer or
    boolean tensor, travel exact in their own dtype. `rules` override both: the first pattern (as in a shell) that
    a tensor's name fits gives its encoder. With `joint`, what goes through `encoder` is encoded as one vector, the
    tensors behind each other in the schema's order: so that top-k chooses among the whole model's elements.

    What goes through stages can be made smaller first, or alike:
    - `reference`: instead of each tensor its difference is encoded from one that both sides hold;
    - with `error_feedback` whoever encodes keeps what a message did not tell, the `residual`, and adds it to the
      tensors of the next (Seide 2014; Karimireddy 2019): small elements that are rounded to 0 are sent in the end,
      and so is what a stage clipped;
    - with `common_scale` all are divided by the root mean square over all of them, one value of the message. Stages
      whose steps are not relative then have the same step in all tensors, and bits are shared out between these to
      where they reduce the squared error most ("equal slope", Shoham and Gersho 1988);
    - `rate_control` multiplies the common scale with a factor that follows earlier rounds.

    The body of a message is: the attached tensors, exact; the common scale (float64 if a tensor that it scales is, else
    float32); then a payload a tensor, in the schema's order.
    """

    encoder: Encoder = Encoder()
    threshold: int = 10_000
    rules: Mapping[str, Encoder] = field(default_factory=dict)
    joint: bool = False
    reference: Reference = "none"
    common_scale: bool = False
    error_feedback: bool = False
    rate_control: RateController | None = None
    _fingerprints: dict[Any, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold must be 0 or more elements, not {self.threshold}")
        if self.reference not in get_args(Reference):
            raise ValueError(f"reference must be one of {get_args(Reference)}, not {self.reference!r}")
        if self.reference == "last" and self.error_feedback:
            raise ValueError(
                "error_feedback must be false with reference=last, whose differences hold all errors before"
            )
        if self.rate_control is not None and not isinstance(self.rate_control, RateController):
            raise TypeError(f"{self.rate_control!r} is not a rate_control")
        if self.rate_control and not self.common_scale:
            raise ValueError("common_scale must be true for a rate_control, which multiplies it")

    def chains(self, schema: Schema) -> dict[str, tuple[TensorSpec, Encoder]]:
        """Returns what is encoded, in order, with its encoder: the tensors, and the joint vector in the first's place.

        Raises EncodeError where tensors of different dtypes are to be joined.
        """
        chains: dict[str, tuple[TensorSpec, Encoder]] = {}
        joined = self._joined(schema)
        for name, spec in schema.items():
            if name in joined:
                chains[JOINT] = (joined[name], self.encoder)
            else:
                chains[name] = (spec, self._encoder_for(name, spec) or Encoder())
        return chains

    def initial_state(self, schema: Schema) -> ByTensor:
        """Returns the state of all that is adaptive before the first round."""
        specs = {name: spec for name, (spec, _) in self.chains(schema).items()}
        return {
            name: {i: part.initial_state(specs.get(name, _SCALAR)) for i, part in parts.items()}
            for name, parts in self._adaptive(schema).items()
        }

    def params(self, schema: Schema, state: ByTensor) -> ByTensor:
        """Returns what the adaptive parts need this round, on both sides."""
        adaptive = self._adaptive(schema)
        return {
            name: {i: adaptive[name][i].params(own) for i, own in by_place.items()} for name, by_place in state.items()
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
        updates, adaptive, after = unflatten(aggregated), self._adaptive(schema), {}
        for name, by_place in state.items():
            parts, own_updates = adaptive[name], updates.get(name, {})
            after[name] = {i: parts[i].update_state(own, own_updates.get(i, {})) for i, own in by_place.items()}
        return after

    def encode(
        self,
        tensors: Tensors,
        key: Key,
        params: ByTensor | None = None,
        attached: Tensors | None = None,
        report: bool = False,
        reference: Tensors | None = None,
        loss: float | None = None,
    ) -> tuple[bytes, ByTensor]:
        """Returns the message of a state_dict and the state updates of what is adaptive.

        `params` are the adaptive parts'. `attached` tensors travel before the payloads; with `report`, so do the
        updates. `reference` is the state_dict that the encoder's reference stands for; `loss` that of the training
        which gave the tensors, for rate control. Raises EncodeError, naming the tensor, for NaN and infinity,
        which are never sent, and for what a stage does not take.
        """
        schema, payloads = schema_of(tensors), []
        if self._adaptive(schema) and (params is None or (self.rate_control and RATE_CONTROL not in params)):
            raise TypeError("an encoder that follows the rounds must be given its params: params=")
        params = params or {}
        updates: dict[str, ByPlace] = {}
        chains = self.chains(schema)
        tensors = {name: _finite(name, tensor.detach()) for name, tensor in tensors.items()}
        staged, references = self._staged(schema), self._references(reference, schema)
        for name, other in references.items():
            tensors[name] = _finite(name, tensors[name] - other)
        scale = []
        if self.common_scale:
            factor = float(params[RATE_CONTROL][0]["factor"]) if self.rate_control else 1.0
            scale = [_common_scale({name: tensors[name] for name in staged}, factor, self._scale_spec(schema).dtype)]
            tensors |= {name: _divided(name, tensors[name], scale[0]) for name in staged}
        if joined := self._joined(schema):
            tensors |= {JOINT: torch.cat([tensors[name].reshape(-1) for name in joined])}
        for name, (_, encoder) in chains.items():
            try:
                payload, reported = encoder.encode(tensors[name], key.fold(name), params.get(name, {}))
            except ValueError as error:
                raise EncodeError(f"tensor {name!r} cannot be encoded: {error}") from error
            payloads += payload
            if reported:
                updates[name] = reported
        if self.rate_control:
            number = loss
            if self.rate_control.reports == "bits":
                # all zeros, as a first difference from initial weights, tell nothing of what a step costs
                told = any(bool(tensors[name].any()) for name in staged)
                bits = 8 * sum(memoryview(part).nbytes for part in payloads) if told else 0
                number = bits / max(1, sum(spec.numel for spec in schema.values()))
            if number is None:
                raise TypeError("a rate_control that follows the training loss must be given it: loss=")
            updates[RATE_CONTROL] = {0: {self.rate_control.reports: torch.tensor(number, dtype=torch.float32)}}
        front = dict(attached or {}) | (flatten(updates) if report else {})
        exact = Encoder()
        parts = [part for name, tensor in front.items() for part in exact.encode(_finite(name, tensor), key, {})[0]]
        parts += [part for tensor in scale for part in exact.encode(tensor, key, {})[0]]
        return frame.pack(parts + payloads, self._fingerprint(schema, schema_of(front), references), key), updates

    def decode(
        self,
        message: bytes,
        key: Key,
        schema: Schema,
        params: ByTensor | None = None,
        attached: Schema | None = None,
        device: torch.device | str = "cpu",
        partly: bool = False,
        reference: Tensors | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the state_dict of `schema` and the attached tensors of the schema `attached`, all finite.

        Without `params` the message is taken to bring them, attached. `partly` leaves those first stages undone that
        commute with the sum: the tensors, named as in `chains`, are for `finish` once they are added up over clients.
        Raises MessageError, and nothing else, for bytes that are not of this schema, key and encoder, or that decode to
        NaN or infinity; memory stays within the schema's.
        """
        if partly and self.reference != "none":
            raise TypeError(f"a sum of differences from reference={self.reference!r} is not a sum of tensors")
        references = self._references(reference, schema)
        reader = frame.unpack(message, self._fingerprint(schema, attached or {}, references), key)
        front, tensors, what = {}, {}, ""
        try:
            for name, spec in (attached or {}).items():
                what = f"tensor {name!r}"
                front[name] = read(reader, spec)
            what = "the common scale"
            scale = read(reader, self._scale_spec(schema)) if self.common_scale else torch.ones(())
            if not scale > 0:
                raise ValueError(f"{float(scale)} is no scale")
            chains = self.chains(schema)
            if params is None:
                own = {f"{name}/{i}" for name, parts in self._adaptive(schema).items() for i in parts}
                params = unflatten({path: t for path, t in front.items() if path.rpartition("/")[0] in own})
            for name, (spec, encoder) in chains.items():
                what, own_key, own_params = f"tensor {name!r}", key.fold(name), params.get(name, {})
                # clients' scales differ: nothing is left to decode after a sum
                until = 0 if self.common_scale else len(encoder.front(spec))
                tensor = encoder.decode(reader, spec, own_key, own_params, torch.device(device), until)
                if self.common_scale and _is_staged(spec, encoder):
                    tensor = _multiplied_(tensor, scale)
                whole = until and not partly
                tensors[name] = encoder.finish(tensor, spec, own_key, own_params) if whole else finite(tensor)
            what = "the end of the body"
            reader.close()
            if not partly:
                tensors = self._split(tensors, schema)
                for name, other in references.items():
                    what = f"tensor {name!r}"
                    tensors[name] = saturate(tensors[name] + other, other.dtype)
        except ValueError as error:
            raise MessageError(f"{what} cannot be decoded: {error}") from error
        return tensors, front

    def differs(self, schema: Schema) -> bool:
        """Tells whether messages of `schema` hold differences from a reference."""
        return self.reference != "none" and bool(self._staged(schema))

    def decodes_in_parts(self, schema: Schema) -> bool:
        """Tells whether `decode` gives something else with `partly` than without."""
        summed_first = not self.common_scale and any(
            encoder.front(spec) for spec, encoder in self.chains(schema).values()
        )
        return summed_first or bool(self._joined(schema)) or self.reference != "none"

    def finish(self, total: Tensors, key: Key, schema: Schema, params: ByTensor | None = None) -> dict[str, Tensor]:
        """Returns the state_dict of `schema` from a sum, weighted or not, of what `decode` gives `partly`.

        `key` is the round's, with any client. What has no stage left to decode is handed through, in whatever dtype it
        was added up, and shares its memory with `total`. Raises MessageError, naming the tensor, where the sum or what
        it decodes to is NaN or infinite: messages are finite each, but a sum can overflow.
        """
        tensors, name = {}, ""
        try:
            for name, (spec, encoder) in self.chains(schema).items():
                own_params, tensor = (params or {}).get(name, {}), total[name]
                if self.common_scale:
                    tensors[name] = finite(tensor)
                else:
                    tensors[name] = encoder.finish(tensor, spec, key.fold(name), own_params)
        except ValueError as error:
            raise MessageError(f"tensor {name!r} cannot be decoded: {error}") from error
        return self._split(tensors, schema)

    def residual(self, tensors: Tensors, decoded: Tensors) -> dict[str, Tensor]:
        """Returns what the message of `tensors` did not tell; empty without error feedback."""
        return {name: tensors[name] - decoded[name] for name in self.residual_schema(schema_of(tensors))}

    def residual_schema(self, schema: Schema) -> Schema:
        """Returns the schema of residuals: of what goes through stages; empty without error feedback."""
        return {name: schema[name] for name in self._staged(schema)} if self.error_feedback else {}

    def idle_rules(self, schema: Schema) -> list[str]:
        """Returns the patterns of rules that give no tensor its encoder: mistyped, or behind others that fit."""
        first = {next((p for p in self.rules if fnmatchcase(name, p)), None) for name in schema}
        return [pattern for pattern in self.rules if pattern not in first]

    def _encoder_for(self, name: str, spec: TensorSpec) -> Encoder | None:
        """Returns the encoder of the tensor called `name`: a rule's, `self.encoder`, or None where it travels exact."""
        if rule := self._rule_for(name):
            return rule
        takes = spec.dtype.is_floating_point and spec.dtype.itemsize > 1  # no stage works in float8
        return self.encoder if takes and spec.numel > self.threshold else None

    def _rule_for(self, name: str) -> Encoder | None:
        return next((encoder for pattern, encoder in self.rules.items() if fnmatchcase(name, pattern)), None)

    def _staged(self, schema: Schema) -> list[str]:
        """Returns the names of the floating tensors that go through stages: all others travel as they are."""
        encoders = {name: self._encoder_for(name, spec) for name, spec in schema.items()}
        return [name for name, encoder in encoders.items() if encoder and _is_staged(schema[name], encoder)]

    def _scale_spec(self, schema: Schema) -> TensorSpec:
        """Returns the spec of the common scale: float64 where a tensor that it scales is."""
        wide = any(schema[name].dtype == torch.float64 for name in self._staged(schema))
        return TensorSpec((), torch.float64 if wide else torch.float32)

    def _references(self, reference: Tensors | None, schema: Schema) -> Tensors:
        """Returns what tensors are encoded as differences from; nothing without a reference."""
        if self.reference == "none":
            return {}
        if reference is None:
            raise TypeError(f"a state_dict must be given for reference={self.reference!r}")
        staged = self._staged(schema)
        if any(name not in reference or TensorSpec.of(reference[name]) != schema[name] for name in staged):
            raise TypeError(f"the reference={self.reference!r} has other names, shapes or dtypes than the state_dict")
        return {name: reference[name] for name in staged}

    def _joined(self, schema: Schema) -> dict[str, TensorSpec]:
        """Returns the names of the tensors that are encoded as one vector, each with that vector's spec."""
        chosen = {n: spec for n, spec in schema.items() if self.joint and not self._rule_for(n)}
        names = [name for name, spec in chosen.items() if self._encoder_for(name, spec)]
        dtypes = {schema[name].dtype for name in names}
        if len(dtypes) > 1:
            raise EncodeError(f"tensors of different dtypes cannot be joined: {sorted(map(str, dtypes))}")
        return {name: TensorSpec((sum(schema[n].numel for n in names),), schema[name].dtype) for name in names}

    def _split(self, tensors: dict[str, Tensor], schema: Schema) -> dict[str, Tensor]:
        """Returns the tensors of `schema`, in its order, from those of its chains."""
        if joined := self._joined(schema):
            pieces = torch.split(tensors.pop(JOINT), [schema[name].numel for name in joined])
            tensors |= {name: piece.reshape(schema[name].shape) for name, piece in zip(joined, pieces, strict=True)}
        return {name: tensors[name] for name in schema}

    def _adaptive(self, schema: Schema) -> dict[str, dict[int, Adaptive]]:
        """Returns all that is adaptive: parts of chains by their place, and the rate_control."""
        parts = {name: encoder.adaptive() for name, (_, encoder) in self.chains(schema).items()}
        if self.rate_control:
            parts[RATE_CONTROL] = {0: self.rate_control}
        return {name: by_place for name, by_place in parts.items() if by_place}

    def _updates(self, schema: Schema) -> dict[str, StateUpdate]:
        specs = {name: spec for name, (spec, _) in self.chains(schema).items()}
        return {
            f"{name}/{i}/{update}": value
            for name, parts in self._adaptive(schema).items()
            for i, part in parts.items()
            for update, value in part.update_spec(specs.get(name, _SCALAR)).items()
        }

    def _fingerprint(self, schema: Schema, attached: Schema, references: Tensors) -> bytes:
        """Hashes all that both sides must agree on before they can read each other's messages.

        Of the tensors that differences are from, that is the sum of their elements' bits, as integers.
        """
        both = tuple(schema.items()), tuple(attached.items())
        if both not in self._fingerprints:  # to describe them takes longer than to encode a small message
            agreed: list[Any] = [list(schema.items()), list(self.chains(schema).items()), list(attached.items())]
            if self.reference != "none" or self.common_scale:
                agreed += [self.reference, self.common_scale]
            self._fingerprints[both] = hashlib.blake2b(described(agreed).encode(), digest_size=8).digest()
        if not references:
            return self._fingerprints[both]
        sums = [int(other.view(_INTEGERS[other.dtype.itemsize]).sum()) for other in references.values()]
        return hashlib.blake2b(self._fingerprints[both] + struct.pack(f"<{len(sums)}q", *sums), digest_size=8).digest()


def _is_staged(spec: TensorSpec, encoder: Encoder) -> bool:
    return bool(encoder.stages) and spec.dtype.is_floating_point


def _common_scale(tensors: Tensors, factor: float, dtype: torch.dtype) -> Tensor:
    """Returns the root mean square over all tensors times a factor, above 0: 1 where all is 0.

    Raises EncodeError for an overflow.
    """
    norms = {}
    for name, tensor in tensors.items():  # in pieces that lie in one piece: norms of others depend on how many threads
        pieces = torch.split(tensor.reshape(-1).contiguous(), CHUNK)
        norms[name] = math.hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in pieces))
    value = factor * math.hypot(*norms.values()) / math.sqrt(max(1, sum(t.numel() for t in tensors.values())))
    if not value < torch.finfo(dtype).max:
        raise EncodeError(f"tensor {max(norms, key=lambda name: norms[name])!r} is too large for a common scale")
    return torch.tensor(max(value, torch.finfo(dtype).smallest_normal) if value else 1.0, dtype=dtype)


def _divided(name: str, tensor: Tensor, scale: Tensor) -> Tensor:
    work = torch.promote_types(tensor.dtype, scale.dtype)
    result = exact_divide(tensor.to(work), float(scale)).to(tensor.dtype)
    if result.dtype.itemsize == 2 and not is_finite(result):
        raise EncodeError(f"tensor {name!r} is beyond {tensor.dtype} once divided by the common scale {float(scale):g}")
    return result


def _multiplied_(tensor: Tensor, scale: Tensor) -> Tensor:
    """Returns the product, cut off at the dtype's limits; may write to `tensor`."""
    work = torch.promote_types(tensor.dtype, scale.dtype)
    return saturate(tensor.to(work).mul_(float(scale)), tensor.dtype)


def _finite(name: str, tensor: Tensor) -> Tensor:
    """Returns `tensor`; raises EncodeError, naming it, where it holds NaN or infinity."""
    if not is_finite(tensor):
        raise EncodeError(f"tensor {name!r} holds NaN or infinity and is not sent")
    return tensor
