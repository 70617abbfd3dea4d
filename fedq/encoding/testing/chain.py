"""Sends tensors of the battery through a chain. No other file of the battery calls a StateDictEncoder."""

import contextlib
import functools
import struct
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedq.encoding.adaptation import by_part
from fedq.encoding.codec import EncodeError
from fedq.encoding.encoder import Encoder
from fedq.encoding.schema import Tensors, TensorSpec, schema_of
from fedq.encoding.stage import AdaptiveEncodingStage
from fedq.encoding.state_dict import StateDictEncoder
from fedq.encoding.testing.inputs import floating_inputs
from fedq.keys import Key

KEY = Key(seed=2**64 - 1, round=7, client=3)


class Wire:
    """Messages of one tensor, called "x", of a chain.

    encoder: The chain.
    like: A tensor with the shape and dtype of all sent tensors.
    threshold: None uses the chain as the rule for "x". A number uses the chain for floating tensors of more elements.
    """

    def __init__(self, encoder: Encoder, like: Tensor, threshold: int | None = None) -> None:
        rule = StateDictEncoder(rules={"x": encoder})
        both = rule if threshold is None else StateDictEncoder(encoder, threshold)
        schema = schema_of({"x": like})
        self.codec, self._reporting = both.bind(schema), both.bind(schema, reports=True)
        self.adaptation = self.codec.adaptation

    def params(self, state: Tensors | None = None) -> dict[str, Tensor]:
        """Returns the params of `state`, or of the first round."""
        return self.adaptation.params(self.adaptation.initial_state() if state is None else state)

    def encode(self, x: Tensor, key: Key, params: Tensors) -> bytes:
        """Returns the message of `x`."""
        return self.codec.encode({"x": x}, key, params).message

    def decode(self, message: bytes, key: Key, params: Tensors, stop_at_sum: bool = False) -> Tensor:
        """Returns the tensor of a message, or with `stop_at_sum` the tensor that can be added up over clients."""
        return self.codec.decode(message, key, params, stop_at_sum=stop_at_sum).tensors["x"]

    def decode_sum(self, total: Tensor, key: Key, params: Tensors) -> Tensor:
        """Returns the tensor of a sum of tensors from `decode` with `stop_at_sum`."""
        return self.codec.decode_sum({"x": total}, key, params)["x"]

    def report(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors]:
        """Sends `x` with its report; returns the decoded tensor, and the combined report of a cohort of one client."""
        decoded, report = self._reporting.decode(self._reporting.encode({"x": x}, key, params).message, key, params)
        return decoded["x"], self.adaptation.as_cohort(report)

    def next_state(self, state: Tensors, reports: list[Tensors]) -> dict[str, Tensor]:
        """Returns the state after a round with these reports of its clients."""
        return self.adaptation.update_state(state, functools.reduce(self.adaptation.combine, reports))


def encode(encoder: Encoder, x: Tensor, key: Key = KEY) -> bytes:
    """Returns the first round's message of `x`."""
    wire = Wire(encoder, x)
    return wire.encode(x, key, wire.params())


def decode(encoder: Encoder, message: bytes, x: Tensor, key: Key = KEY) -> Tensor:
    """Returns the tensor of a first round's message of a tensor like `x`."""
    wire = Wire(encoder, x)
    return wire.decode(message, key, wire.params())


def send(encoder: Encoder, x: Tensor, key: Key = KEY) -> Tensor:
    """Returns the decoded `x` of the first round."""
    return decode(encoder, encode(encoder, x, key), x, key)


_last: tuple[Encoder | None, dict[str, bytes]] = (None, {})
"""The last chain and its messages, because several checks in a row need them."""


def messages_of(encoder: Encoder) -> dict[str, bytes]:
    """Returns the messages of the floating inputs that the chain does not refuse."""
    global _last
    if _last[0] is not encoder:
        messages = {}
        for name, x in floating_inputs().items():
            with contextlib.suppress(EncodeError):
                messages[name] = encode(encoder, x)
        _last = encoder, messages
    return _last[1]


def taken(encoder: Encoder) -> dict[str, Tensor]:
    """Returns the floating inputs that the chain does not refuse. check_round_trip tests which inputs it may refuse."""
    messages = messages_of(encoder)
    return {name: x for name, x in floating_inputs().items() if name in messages}


def steps(encoder: Encoder, x: Tensor, key: Key = KEY) -> Iterator[tuple[Tensor, Tensors, Callable[[Tensor], Tensor]]]:
    """Yields for each stage of a chain its result, its side values, and a function that decodes the result."""
    spec, params = TensorSpec.of(x), by_part(Wire(encoder, x).params())
    for i, stage in enumerate(encoder.stages):
        own = key.fold("x").fold(str(i))
        if isinstance(stage, AdaptiveEncodingStage):
            y, side, _ = stage.encode(x, own, params.get(f"x/{i}", {}))
            decode = functools.partial(stage.decode, side=side, spec=spec, key=own, params=params.get(f"x/{i}", {}))
        else:
            y, side = stage.encode(x, own)
            decode = functools.partial(stage.decode, side=side, spec=spec, key=own)
        yield y, side, decode
        x, spec = y, stage.encoded_spec(spec, side)


def lossless(encoder: Encoder) -> bool:
    """Returns whether all stages claim to be lossless."""
    return all(stage.lossless for stage in encoder.stages)


def unbiased(encoder: Encoder) -> bool:
    """Returns whether a chain has stages that all claim to be unbiased or lossless."""
    return bool(encoder.stages) and all(stage.unbiased or stage.lossless for stage in encoder.stages)


def reframe(message: bytes, body: bytes) -> bytes:
    """Returns `message` with another body, and with the right length and checksum."""
    head = message[:36] + struct.pack("<Q", len(body)) + body
    return head + struct.pack("<I", zlib.crc32(head))


def raw_bytes(x: Tensor) -> bytes:
    """Returns the elements of `x` as bytes, in row-major order."""
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.reshape(-1)).view(torch.uint8).numpy().tobytes()


def same(x: Tensor, y: Tensor) -> bool:
    """Returns whether two tensors have the same dtype, shape and bytes."""
    return x.dtype == y.dtype and x.shape == y.shape and raw_bytes(x) == raw_bytes(y)


def all_same(x: Tensors, y: Tensors) -> bool:
    """Returns whether two states or params have the same names and equal tensors."""
    return x.keys() == y.keys() and all(same(x[path], y[path]) for path in x)
