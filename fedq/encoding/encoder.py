"""An encoder: a chain of stages and one coder; one tensor ↔ one payload."""

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.encoding.coders import Coder, Raw
from fedq.encoding.coders.coder import Buffer
from fedq.encoding.message import Reader
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage, Tensors, TensorSpec
from fedq.keys import Key

ByStage = Mapping[int, Tensors]
"""Tensors of the adaptive stages of a chain, by the stage's place in it."""

_EXACT = Raw()


@dataclass(frozen=True)
class Encoder:
    """A chain of stages, applied in order, and the coder of what the last one gives.

    A payload is: for each stage its side values, exact; then the coder's bytes, behind their length (uint32)
    where the coder cannot tell it from the spec. An encoder without stages and coder sends the tensor exact.
    """

    stages: Sequence[EncodingStage | AdaptiveEncodingStage] = ()
    coder: Coder = _EXACT

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for part in (*self.stages, self.coder):
            if not dataclasses.is_dataclass(part):
                raise TypeError(f"{type(part).__name__} must be a dataclass: its repr is part of the schema")

    def adaptive(self) -> dict[int, AdaptiveEncodingStage]:
        """Returns the adaptive stages by their place in the chain."""
        return {i: stage for i, stage in enumerate(self.stages) if isinstance(stage, AdaptiveEncodingStage)}

    def encode(self, x: Tensor, key: Key, params: ByStage) -> tuple[list[Buffer], ByStage]:
        """Returns the payload of `x` (finite, any shape and dtype the stages take), in parts, and the state updates.

        Raises ValueError for an `x` that a stage does not take.
        """
        parts: list[Buffer] = []
        updates: dict[int, Tensors] = {}
        first = spec = TensorSpec.of(x)
        for i, stage in enumerate(self.stages):
            if isinstance(stage, AdaptiveEncodingStage):
                y, side, update = stage.encode(x, key.fold(str(i)), params[i])
                declared = stage.update_spec(first)
                _check(stage, update, {name: value.spec for name, value in declared.items()})
                updates[i] = {name: update[name] for name in declared}
            else:
                y, side = stage.encode(x, key.fold(str(i)))
            side_spec, encoded_spec = stage.side_spec(spec), stage.encoded_spec(spec, side)
            _check(stage, side, side_spec)
            _check(stage, {"encoded": y}, {"encoded": dataclasses.replace(encoded_spec, levels=None)})
            for name, value in side_spec.items():
                if not is_finite(side[name]):
                    raise ValueError(f"{type(stage).__name__} makes the side value {name!r} NaN or infinite")
                parts.append(_EXACT.encode(side[name], value))
            x, spec = y, encoded_spec
        body = self.coder.encode(x, spec)
        if self.coder.size(spec) is None:
            parts.append(struct.pack("<I", len(body)))
        return [*parts, body], updates

    def decode(self, reader: Reader, spec: TensorSpec, key: Key, params: ByStage, device: torch.device) -> Tensor:
        """Reads one payload and returns the tensor of `spec`. Raises ValueError for bytes never encoded."""
        specs, sides = [spec], []
        for stage in self.stages:
            side = {name: read_exact(reader, value) for name, value in stage.side_spec(specs[-1]).items()}
            specs.append(stage.encoded_spec(specs[-1], side))
            sides.append(side)
        size = self.coder.size(specs[-1])
        if size is None:
            (size,) = struct.unpack("<I", reader.read(4))
        x = self.coder.decode(reader.read(size), specs[-1]).to(device)
        for i, stage in reversed(list(enumerate(self.stages))):
            folded = key.fold(str(i))
            if isinstance(stage, AdaptiveEncodingStage):
                x = stage.decode(x, sides[i], specs[i], folded, params[i])
            else:
                x = stage.decode(x, sides[i], specs[i], folded)
        return x


def read_exact(reader: Reader, spec: TensorSpec) -> Tensor:
    """Reads one exact tensor of `spec`, on the CPU. Raises ValueError where it holds NaN or infinity."""
    tensor = _EXACT.decode(reader.read(spec.numel * spec.dtype.itemsize), spec)
    if not is_finite(tensor):
        raise ValueError("a value is NaN or infinite")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Tells whether `tensor` holds no NaN and no infinity; integers never do."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # One NaN or infinity makes the sum one too, in a fifth of the time; the reverse may be an overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _check(stage: EncodingStage | AdaptiveEncodingStage, given: Tensors, declared: Mapping[str, TensorSpec]) -> None:
    """Raises TypeError, naming the stage, where it gives other tensors than it declared."""
    name = type(stage).__name__
    if given.keys() != declared.keys():
        raise TypeError(f"{name} declares {sorted(declared)} but gives {sorted(given)}")
    for key, spec in declared.items():
        if TensorSpec.of(given[key]) != spec:
            raise TypeError(f"{name} declares {key!r} as {spec} but gives {TensorSpec.of(given[key])}")
