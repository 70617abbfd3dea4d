"""An encoder: a chain of stages and one coder. Bound to a tensor's spec, it turns that tensor into bytes and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fedq.encoding.adaptation import by_part
from fedq.encoding.coders import Coder, Raw
from fedq.encoding.coders.coder import Buffer
from fedq.encoding.message import Reader, varint
from fedq.encoding.numerics import finite, is_finite
from fedq.encoding.schema import Tensors, TensorSpec, canonical_text
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage, Stage
from fedq.keys import Key

_EXACT = Raw()


@dataclass(frozen=True)
class Encoder:
    """A chain of stages and one coder. Without stages and coder, tensors travel exact.

    stages: The stages, in the order of encoding.
    coder: Encodes the last stage's result: symbols ↔ bytes.
    """

    canonical_name: ClassVar[str] = "Encoder"

    stages: Sequence[EncodingStage | AdaptiveEncodingStage] = ()
    coder: Coder = _EXACT

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, EncodingStage | AdaptiveEncodingStage):
                raise TypeError(f"{stage!r} is not a stage")
        if not isinstance(self.coder, Coder):
            raise TypeError(f"{self.coder!r} is not a coder")
        if self.coder.needs_levels and not self.stages:
            raise ValueError(
                f"{type(self.coder).__name__} must stand behind a stage that gives symbols of a known number of levels"
            )
        for part in (*self.stages, self.coder):
            if not dataclasses.is_dataclass(part):
                raise TypeError(f"{type(part).__name__} must be a dataclass: its arguments are part of the schema")
            canonical_text(part)  # raises TypeError for arguments that a schema cannot hold

    def bind(self, spec: TensorSpec, name: str = "x", summable: bool = True) -> "TensorCodec":
        """Returns the codec of the tensor `name`, which has this spec.

        summable: Whether the server may add up payloads before it decodes them, if the stages allow a sum.
        """
        return TensorCodec(self, spec, name, summable)


class _Step(NamedTuple):
    """A stage at its place in a chain. Only an adaptive stage takes params and returns a report."""

    stage: Any
    name: str
    place: str
    path: str
    adaptive: bool


class TensorCodec:
    """An encoder bound to one tensor: tensor ↔ payload.

    A payload holds the side values of each stage, then the coder's bytes. If the length of a part does not follow from
    the spec, its length comes first (see `message.varint`).

    compresses: Whether the tensor is floating and passes stages. All other tensors travel exact.
    adaptive: The adaptive stages, by their path `name/place`.
    summable_prefix: One spec for each first stage that the server can decode after a sum over clients: the spec of the
        stage's input.
    """

    def __init__(self, encoder: Encoder, spec: TensorSpec, name: str, summable: bool) -> None:
        self.encoder, self.spec = encoder, spec
        self._coder = encoder.coder
        self._steps = [
            _Step(stage, type(stage).__name__, str(place), f"{name}/{place}", isinstance(stage, AdaptiveEncodingStage))
            for place, stage in enumerate(encoder.stages)
        ]
        self.adaptive: dict[str, AdaptiveEncodingStage] = {
            step.path: step.stage for step in self._steps if step.adaptive
        }
        self._reported = {
            path: {own: update.spec for own, update in stage.update_spec(spec).items()}
            for path, stage in self.adaptive.items()
        }
        self.compresses = bool(encoder.stages) and spec.dtype.is_floating_point
        self.summable_prefix = _summable_prefix(encoder.stages, spec) if summable else []

    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[list[Buffer], dict[str, Tensor]]:
        """Returns the parts of the payload of `x`, and the reports of the adaptive stages.

        `x` is finite and has the codec's spec. Raises ValueError if a stage cannot encode `x`.
        """
        parts: list[Buffer] = []
        reports: dict[str, Tensor] = {}
        own_params = by_part(params) if self.adaptive else {}
        x = x.resolve_conj().resolve_neg()  # numpy cannot read these views
        spec = self.spec
        for step in self._steps:
            stage, name = step.stage, step.name
            side_spec = stage.side_spec(spec)
            result = stage.encode(x, key.fold(step.place), *([own_params.get(step.path, {})] if step.adaptive else []))
            if not isinstance(result, tuple) or len(result) != 2 + step.adaptive:
                returns = ("the encoded tensor", "side values", "state updates")[: 2 + step.adaptive]
                raise TypeError(f"{name}.encode must return {', '.join(returns)}")
            x, side = result[:2]
            if step.adaptive:
                report, declared = result[2], self._reported[step.path]
                check_declared(f"{name}.encode", report, declared)
                reports |= {f"{step.path}/{own}": report[own].cpu() for own in declared}
            check_declared(f"{name}.encode", side, side_spec)
            spec = stage.encoded_spec(spec, side)
            check_declared(f"{name}.encode", {"encoded": x}, {"encoded": spec})
            for value, tensor in (*side.items(), ("encoded", x)):
                if not is_finite(tensor):
                    raise ValueError(f"{name} makes {value} NaN or infinite")
            for value, its_spec in side_spec.items():
                parts += write(side[value], its_spec, stage.side_coders.get(value, _EXACT))
        return [*parts, *write(x, spec, self._coder)], reports

    def decode(self, reader: Reader, key: Key, params: Tensors, device: torch.device, stop_at_sum: bool) -> Tensor:
        """Reads one payload and returns the tensor.

        stop_at_sum: Whether to leave the stages of the summable prefix to `decode_sum`.

        Raises ValueError for bytes that `encode` cannot write, and for NaN and infinity.
        """
        specs, sides = [self.spec], []
        for step in self._steps:
            side_spec = step.stage.side_spec(specs[-1])
            coders = step.stage.side_coders
            side = {name: read(reader, spec, coders.get(name, _EXACT)) for name, spec in side_spec.items()}
            specs.append(step.stage.encoded_spec(specs[-1], side))
            sides.append(side)
        x = read(reader, specs[-1], self._coder).to(device)
        return self.decode_stages(x, specs, sides, key, params, len(self.summable_prefix) if stop_at_sum else 0)

    def decode_stages(
        self, x: Tensor, specs: Sequence[TensorSpec], sides: Sequence[Tensors], key: Key, params: Tensors, stop: int = 0
    ) -> Tensor:
        """Decodes a finite `x`, from the stage of the last entry of `sides` back to the stage `stop`.

        specs: The specs of the stages' inputs.
        sides: The side values of the stages.
        stop: The place of the stage that is decoded last.

        Raises ValueError for NaN and infinity.
        """
        own_params = by_part(params) if self.adaptive else {}
        for i in reversed(range(stop, len(sides))):
            step = self._steps[i]
            arguments = [own_params.get(step.path, {})] if step.adaptive else []
            x = step.stage.decode(x, sides[i], specs[i], key.fold(step.place), *arguments)
            check_declared(f"{step.name}.decode", {"decoded": x}, {"decoded": specs[i]})
            x = finite(x)
        return x


def write(tensor: Tensor, spec: TensorSpec, coder: Coder = _EXACT) -> list[Buffer]:
    """Returns the bytes of one tensor of `spec`. If their length does not follow from `spec`, it comes first."""
    body = coder.encode(tensor, spec)
    return [body] if coder.size(spec) is not None else [varint(memoryview(body).nbytes), body]


def read(reader: Reader, spec: TensorSpec, coder: Coder = _EXACT) -> Tensor:
    """Reads a tensor that `write` wrote, on the CPU. Raises ValueError for NaN and infinity."""
    size = coder.size(spec)
    return finite(coder.decode(reader.read(reader.read_varint() if size is None else size), spec))


def check_declared(who: str, given: Tensors, declared: Mapping[str, TensorSpec]) -> None:
    """Raises TypeError, naming the method `who`, if its tensors are not as the stage declares."""
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


def _summable_prefix(stages: Sequence[Stage], spec: TensorSpec) -> list[TensorSpec]:
    """Returns the spec of each stage's input, for the first stages that can be decoded after a weighted sum.

    The sum needs a floating dtype of at least 32 bits that is no narrower than the stage's input. A weighted sum would
    overflow a narrower dtype.
    """
    specs: list[TensorSpec] = []
    for stage in stages:
        # other stages may need side values for encoded_spec
        if not (stage.commutes_with_sum and spec.dtype.is_floating_point and spec.dtype.itemsize >= 4):
            break
        encoded = stage.encoded_spec(spec, {})
        if not (encoded.dtype.is_floating_point and encoded.dtype.itemsize >= spec.dtype.itemsize):
            break
        specs.append(spec)
        spec = encoded
    return specs
