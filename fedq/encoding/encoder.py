"""An encoder: a chain of stages and one coder; one tensor ↔ one payload."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedq.encoding.adaptive import Adaptive
from fedq.encoding.coders import AdaptiveCoder, Coder, Raw
from fedq.encoding.coders.coder import Buffer
from fedq.encoding.message import Reader, length
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.keys import Key

ByPlace = Mapping[int, Tensors]
"""Tensors of the adaptive parts of a chain, by their place in it; the coder's is behind the last stage's."""

_EXACT = Raw()


@dataclass(frozen=True)
class Encoder:
    """A chain of stages, applied in order, and the coder of what the last one gives.

    A payload is: for each stage its side values; then the coder's bytes. Whatever has a length that the spec does
    not tell stands behind that length (see message.length). An encoder without stages and coder sends the tensor exact.
    """

    stages: Sequence[EncodingStage | AdaptiveEncodingStage] = ()
    coder: Coder | AdaptiveCoder = _EXACT

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, EncodingStage | AdaptiveEncodingStage):
                raise TypeError(f"{stage!r} is not a stage")
        if not isinstance(self.coder, Coder | AdaptiveCoder):
            raise TypeError(f"{self.coder!r} is not a coder")
        for part in (*self.stages, self.coder):
            if not dataclasses.is_dataclass(part):
                raise TypeError(f"{type(part).__name__} must be a dataclass: its arguments are part of the schema")
            described(part)  # raises TypeError for arguments that a schema cannot hold

    def adaptive(self) -> dict[int, Adaptive]:
        """Returns the adaptive stages, and the coder if it is adaptive, by their place in the chain."""
        return {i: part for i, part in enumerate((*self.stages, self.coder)) if isinstance(part, Adaptive)}

    def encode(self, x: Tensor, key: Key, params: ByPlace) -> tuple[list[Buffer], ByPlace]:
        """Returns the payload of `x` (finite, any shape and dtype the stages take), in parts, and the state updates.

        Raises ValueError for an `x` that a stage does not take.
        """
        parts: list[Buffer] = []
        updates: dict[int, Tensors] = {}
        x = x.resolve_conj().resolve_neg()  # views of torch's that numpy does not read
        first = spec = TensorSpec.of(x)
        for i, stage in enumerate(self.stages):
            name, side_spec = type(stage).__name__, stage.side_spec(spec)
            if isinstance(stage, AdaptiveEncodingStage):
                y, side, update = _returned(name, 3, stage.encode(x, key.fold(str(i)), params.get(i, {})))
                updates[i] = _declared(stage, update, first)
            else:
                y, side = _returned(name, 2, stage.encode(x, key.fold(str(i))))
            check_declared(f"{name}.encode", side, side_spec)
            spec = stage.encoded_spec(spec, side)
            check_declared(f"{name}.encode", {"encoded": y}, {"encoded": spec})
            for value, tensor in [(value, side[value]) for value in side_spec] + [("encoded", y)]:
                if not is_finite(tensor):
                    raise ValueError(f"{name} makes {value} NaN or infinite")
            for value, own_spec in side_spec.items():
                coder = stage.side_coder(value)
                parts += _framed(coder, coder.encode(side[value], own_spec), own_spec)
            x = y
        if isinstance(self.coder, AdaptiveCoder):
            body, update = self.coder.encode(x, spec, params.get(len(self.stages), {}))
            updates[len(self.stages)] = _declared(self.coder, update, first)
        else:
            body = self.coder.encode(x, spec)
        return [*parts, *_framed(self.coder, body, spec)], updates

    def front(self, spec: TensorSpec) -> list[TensorSpec]:
        """Returns what enters each of the first stages, as far as these can be decoded once, after a sum over clients.

        A weighted sum needs a floating dtype, and one no narrower than what enters the stage. There are no such stages
        for less than 32 bits: they cut off what they decode at its dtype's limits, and a weighted sum is soon there.
        """
        specs: list[TensorSpec] = []
        for stage in self.stages:
            # only then can the stage be asked what it makes of it
            if not (stage.commutes_with_sum and spec.dtype.is_floating_point and spec.dtype.itemsize >= 4):
                break
            encoded = stage.encoded_spec(spec, {})
            if not (encoded.dtype.is_floating_point and encoded.dtype.itemsize >= spec.dtype.itemsize):
                break
            specs.append(spec)
            spec = encoded
        return specs

    def decode(
        self, reader: Reader, spec: TensorSpec, key: Key, params: ByPlace, device: torch.device, until: int = 0
    ) -> Tensor:
        """Reads one payload and returns the tensor of `spec`, or what entered stage number `until` on the way there.

        Raises ValueError for bytes never encoded.
        """
        specs, sides = [spec], []
        for stage in self.stages:
            side = {
                name: read(reader, value, stage.side_coder(name)) for name, value in stage.side_spec(specs[-1]).items()
            }
            specs.append(stage.encoded_spec(specs[-1], side))
            sides.append(side)
        if isinstance(self.coder, AdaptiveCoder):
            x = self.coder.decode(_unframed(reader, self.coder, specs[-1]), specs[-1], params.get(len(self.stages), {}))
        else:
            x = self.coder.decode(_unframed(reader, self.coder, specs[-1]), specs[-1])
        # a stage may cut infinity off at what its dtype holds, and all that is decoded is finite
        x = finite(x) if self.stages else x
        return self._back(x.to(device), specs, sides, key, params, until)

    def finish(self, x: Tensor, spec: TensorSpec, key: Key, params: ByPlace) -> Tensor:
        """Returns the tensor of `spec` from a sum of what `decode` gives with `until` behind the `front`.

        `x` itself where that is all. Raises ValueError for NaN and infinity.
        """
        specs = self.front(spec)
        return finite(self._back(finite(x), specs, [{}] * len(specs), key, params, 0)) if specs else finite(x)

    def _back(
        self, x: Tensor, specs: Sequence[TensorSpec], sides: Sequence[Tensors], key: Key, params: ByPlace, until: int
    ) -> Tensor:
        """Decodes `x` by as many stages as there are `sides`, from the last back to number `until`."""
        for i in reversed(range(until, len(sides))):
            stage, folded = self.stages[i], key.fold(str(i))
            if isinstance(stage, AdaptiveEncodingStage):
                x = stage.decode(x, sides[i], specs[i], folded, params.get(i, {}))
            else:
                x = stage.decode(x, sides[i], specs[i], folded)
            check_declared(f"{type(stage).__name__}.decode", {"decoded": x}, {"decoded": specs[i]})
        return x


def read(reader: Reader, spec: TensorSpec, coder: Coder = _EXACT) -> Tensor:
    """Reads one exact tensor of `spec`, on the CPU. Raises ValueError where it holds NaN or infinity."""
    return finite(coder.decode(_unframed(reader, coder, spec), spec))


def finite(tensor: Tensor) -> Tensor:
    """Returns `tensor`. Raises ValueError where it holds NaN or infinity."""
    if not is_finite(tensor):
        raise ValueError("a value is NaN or infinite")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Tells whether `tensor` holds no NaN and no infinity; integers never do."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.dtype.itemsize == 1:  # float8, which torch cannot add up
        tensor = tensor.float()
    # One NaN or infinity makes the sum one too, in a fifth of the time; the reverse may be an overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_declared(who: str, given: Tensors, declared: Mapping[str, TensorSpec]) -> None:
    """Raises TypeError, naming the author's method, where it gives other tensors than the stage declares."""
    if given.keys() != declared.keys():
        raise TypeError(f"{who} gives {sorted(given)}, but {sorted(declared)} are declared")
    for name, spec in declared.items():
        if not isinstance(given[name], Tensor):
            raise TypeError(f"{who} gives {name!r} as a {type(given[name]).__name__}, not as a tensor")
        if tuple(given[name].shape) != spec.shape or given[name].dtype != spec.dtype:
            raise TypeError(
                f"{who} gives {name!r} with shape {tuple(given[name].shape)} and dtype {given[name].dtype}, "
                f"but shape {spec.shape} and dtype {spec.dtype} are declared"
            )


def described(part: Any) -> str:
    """Returns text that tells `part` from others: as repr, but arguments with their default value are left out.

    So a new option of a stage leaves the messages of all who do not use it as they are. Raises TypeError for what has
    no such text.
    """
    if dataclasses.is_dataclass(part):
        given = []
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value is not None and field.type in (float, "float", float | None, "float | None"):  # 1 is 1.0
                value = float(value)
            try:
                text = described(value)
            except TypeError as error:
                raise TypeError(f"{type(part).__name__}.{field.name}: {error}") from error
            if value != field.default:
                given.append(f"{field.name}={text}")
        return f"{type(part).__name__}({', '.join(given)})"
    if isinstance(part, Mapping):
        return described(list(part.items()))
    if isinstance(part, list | tuple):
        return f"[{', '.join(map(described, part))}]"
    if not isinstance(part, str | int | float | torch.dtype | None):
        raise TypeError(f"arguments must be plain values, stages or coders, not {type(part).__name__}")
    return repr(float(part) if isinstance(part, float) else part)  # numpy's is one, with a repr of its own


def _declared(part: Adaptive, update: Tensors, spec: TensorSpec) -> dict[str, Tensor]:
    """Returns the state updates in the order declared, on the CPU; raises TypeError where they are others."""
    declared = {name: value.spec for name, value in part.update_spec(spec).items()}
    check_declared(f"{type(part).__name__}.encode", update, declared)
    return {name: update[name].cpu() for name in declared}


def _returned(name: str, count: int, result: Any) -> Any:
    """Returns what a stage's encode gave; raises TypeError where that is not a tuple of `count`."""
    if not isinstance(result, tuple) or len(result) != count:
        parts = ("the encoded tensor", "side values", "state updates")[:count]
        raise TypeError(f"{name}.encode must return {', '.join(parts)}")
    return result


def _framed(coder: Coder | AdaptiveCoder, body: Buffer, spec: TensorSpec) -> list[Buffer]:
    """Returns `body` behind its length, where `coder` cannot tell it from `spec`."""
    fixed = isinstance(coder, Coder) and coder.size(spec) is not None
    return [body] if fixed else [length(memoryview(body).nbytes), body]


def _unframed(reader: Reader, coder: Coder | AdaptiveCoder, spec: TensorSpec) -> memoryview:
    """Reads what `_framed` made."""
    size = coder.size(spec) if isinstance(coder, Coder) else None
    if size is None:
        size = reader.read_length()
    return reader.read(size)
