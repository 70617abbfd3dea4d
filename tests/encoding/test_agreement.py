"""What both sides of a message must agree on: schema, encoder, reference, key; and how its frame says so."""

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
import torch
from toys import Negate, Reverse, Zlib

from fedq.encoding import (
    BROADCAST,
    CABAC,
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    MessageError,
    Raw,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    TernGrad,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.testing import wave

KEY = Key(1, 2, 3)
UINT8 = Encoder([UniformQuantization(8)], FixedWidth())
QUANTISED = StateDictEncoder(UINT8, threshold=10, rules={"b": Encoder([UniformQuantization(4)], FixedWidth())})
AGREED = {"a": TensorSpec((20,), torch.float32), "b": TensorSpec((2, 3), torch.float32)}
OTHER_SCHEMAS = {
    "a name": {"c": AGREED["a"], "b": AGREED["b"]},
    "the order": {"b": AGREED["b"], "a": AGREED["a"]},
    "a shape of as many elements": {"a": TensorSpec((4, 5), torch.float32), "b": AGREED["b"]},
    "a dtype of as many bytes": {"a": AGREED["a"], "b": TensorSpec((2, 3), torch.int32)},
    "one tensor less": {"a": AGREED["a"]},
    "one empty tensor more": {**AGREED, "c": TensorSpec((0,), torch.float32)},
}
OTHER_ENCODERS = {
    "bits": dataclasses.replace(QUANTISED, encoder=Encoder([UniformQuantization(7)], FixedWidth())),
    "rounding": dataclasses.replace(QUANTISED, encoder=Encoder([UniformQuantization(8, "nearest")], FixedWidth())),
    "coder": dataclasses.replace(QUANTISED, encoder=Encoder([UniformQuantization(8)], Raw())),
    "another coder": dataclasses.replace(QUANTISED, encoder=Encoder([UniformQuantization(8)], Zlib())),
    "a stage more": dataclasses.replace(QUANTISED, encoder=Encoder([Negate(), *UINT8.stages], FixedWidth())),
    "the stages' order": dataclasses.replace(QUANTISED, encoder=Encoder([*UINT8.stages, Reverse()], FixedWidth())),
    "a threshold that leaves a out": dataclasses.replace(QUANTISED, threshold=20),
    "no rule": dataclasses.replace(QUANTISED, rules={}),
    "a rule for all": dataclasses.replace(QUANTISED, rules={"*": UINT8}),
}


def message_of() -> bytes:
    return QUANTISED.encode({"a": wave(20), "b": wave(2, 3)}, KEY)[0]


@pytest.mark.parametrize("other", OTHER_SCHEMAS)
def test_another_schema_is_refused(other: str) -> None:
    with pytest.raises(MessageError, match="differ in model, encoder, reference or version"):
        QUANTISED.decode(message_of(), KEY, OTHER_SCHEMAS[other])


@pytest.mark.parametrize("other", OTHER_ENCODERS)
def test_another_encoder_is_refused(other: str) -> None:
    with pytest.raises(MessageError, match="differ in model, encoder, reference or version"):
        OTHER_ENCODERS[other].decode(message_of(), KEY, AGREED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_another_reference_is_refused(dtype: torch.dtype) -> None:
    """Of what differences are from: one bit off in one element, or another round's."""
    tensors = {"a": wave(20).to(dtype), "b": wave(2, 3).to(dtype)}
    encoder = dataclasses.replace(QUANTISED, reference="initial")
    theirs = {name: 0.5 * tensor for name, tensor in tensors.items()}
    message, _ = encoder.encode(tensors, KEY, reference=theirs)
    encoder.decode(message, KEY, schema_of(tensors), reference={name: value.clone() for name, value in theirs.items()})
    flipped = theirs["a"].clone()
    flipped.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])[3] ^= 1
    for other in (theirs | {"a": flipped}, {name: torch.zeros_like(value) for name, value in theirs.items()}):
        with pytest.raises(MessageError, match="differ in model, encoder, reference or version"):
            encoder.decode(message, KEY, schema_of(tensors), reference=other)


def test_all_fingerprints_differ() -> None:
    prints = [QUANTISED._fingerprint(AGREED, {}, {})]
    prints += [QUANTISED._fingerprint(schema, {}, {}) for schema in OTHER_SCHEMAS.values()]
    prints += [encoder._fingerprint(AGREED, {}, {}) for encoder in OTHER_ENCODERS.values()]
    prints += [QUANTISED._fingerprint(AGREED, {"c": AGREED["a"]}, {})]
    assert len(set(prints)) == len(prints)


def test_what_gives_the_same_chains_is_the_same_schema() -> None:
    # the threshold is only how to choose: what was chosen must agree
    for same_choice in (dataclasses.replace(QUANTISED, threshold=19), dataclasses.replace(QUANTISED, threshold=6)):
        back, _ = same_choice.decode(message_of(), KEY, AGREED)
        assert back.keys() == AGREED.keys()


@pytest.mark.parametrize(
    "key", [Key(0, 2, 3), Key(1, 3, 3), Key(1, 2, 4), Key(1, 2, BROADCAST), Key(1, 2), Key(2**64 - 1, 2, 3)], ids=str
)
def test_another_key_is_refused(key: Key) -> None:
    with pytest.raises(MessageError, match=r"expected seed|seed 1, round 2, client 3"):
        QUANTISED.decode(message_of(), key, AGREED)


def test_the_header_is_as_documented() -> None:
    message = message_of()
    fields = struct.unpack_from("<4sHH8sQIQQ", message)
    assert fields == (b"FEDQ", 4, 0, QUANTISED._fingerprint(AGREED, {}, {}), 1, 2, 3, len(message) - 48)


def test_the_fingerprint_tells_what_differs_and_nothing_else() -> None:
    @dataclasses.dataclass(frozen=True)
    class UniformQuantizationOfTomorrow(UniformQuantization):
        tomorrow: int | None = None  # a new option

    UniformQuantizationOfTomorrow.__name__ = "UniformQuantization"

    def fingerprint(*stages: EncodingStage, **more: Any) -> bytes:
        schema = {"x": TensorSpec((20_000,), torch.float32)}
        return StateDictEncoder(Encoder(stages, FixedWidth()), **more)._fingerprint(schema, {}, {})

    equal = (UniformQuantization(), UniformQuantization(8), UniformQuantizationOfTomorrow())
    same = {fingerprint(stage) for stage in equal}
    assert len(same) == 1
    others = [
        fingerprint(UniformQuantization(7)),
        fingerprint(UniformQuantization(8, "nearest")),
        fingerprint(UniformQuantizationOfTomorrow(tomorrow=3)),
        fingerprint(UniformQuantization(), UniformQuantization()),
        fingerprint(),
        fingerprint(UniformQuantization(), threshold=10**6),
        fingerprint(UniformQuantization(), joint=True),
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_arguments_that_repr_cannot_tell_apart_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Table(UniformQuantization):
        table: torch.Tensor | None = None

    with pytest.raises(TypeError, match="plain values"):
        StateDictEncoder(Encoder([Table(table=wave(3))]), 0).encode({"x": wave(5)}, KEY)


def test_equal_encoders_read_each_other() -> None:
    x = {"x": wave(100)}
    chains = [
        StateDictEncoder(Encoder([StepQuantization(step, relative=False)], CABAC()), 0)
        for step in (1, 1.0, np.float64(1))
    ]
    assert chains[0] == chains[1] == chains[2]
    messages = {chain.encode(x, KEY)[0] for chain in chains}
    assert len(messages) == 1
    clipped = [StateDictEncoder(Encoder([TernGrad(clip)], FixedWidth()), 0) for clip in (2, 2.0)]
    assert clipped[0].encode(x, KEY) == clipped[1].encode(x, KEY)
    other = StateDictEncoder(Encoder([StepQuantization(2, relative=False)], CABAC()), 0)
    with pytest.raises(MessageError, match="schema"):
        other.decode(messages.pop(), KEY, schema_of(x))
