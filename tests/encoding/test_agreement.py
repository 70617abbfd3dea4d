"""Both sides of a message must agree on schema, encoder, reference and key; the frame shows a difference."""

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
import torch
from toys import Negate, PlusOneOverN, Reverse, Zlib

from fedq.encoding import (
    BROADCAST,
    CABAC,
    BitBudget,
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    MessageError,
    RandomMask,
    Raw,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    TernGrad,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.codec import RATE_CONTROL
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


TENSORS = {"a": wave(20), "b": wave(2, 3)}


def message_of() -> bytes:
    return QUANTISED.bind(AGREED).encode(TENSORS, KEY).message


@pytest.mark.parametrize("other", OTHER_SCHEMAS)
def test_another_schema_is_refused(other: str) -> None:
    with pytest.raises(MessageError, match="differ in model, encoder, reference or version"):
        QUANTISED.bind(OTHER_SCHEMAS[other]).decode(message_of(), KEY)


@pytest.mark.parametrize("other", OTHER_ENCODERS)
def test_another_encoder_is_refused(other: str) -> None:
    with pytest.raises(MessageError, match="differ in model, encoder, reference or version"):
        OTHER_ENCODERS[other].bind(AGREED).decode(message_of(), KEY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_another_reference_is_refused(dtype: torch.dtype) -> None:
    """The reference may differ by one bit in one element, or be of another round."""
    tensors = {"a": wave(20).to(dtype), "b": wave(2, 3).to(dtype)}
    codec = dataclasses.replace(QUANTISED, reference="initial").bind(schema_of(tensors))
    theirs = {name: 0.5 * tensor for name, tensor in tensors.items()}
    message = codec.encode(tensors, KEY, reference=theirs).message
    codec.decode(message, KEY, reference={name: value.clone() for name, value in theirs.items()})
    assert codec.expects(message, theirs)
    flipped = theirs["a"].clone()
    flipped.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])[3] ^= 1
    for other in (theirs | {"a": flipped}, {name: torch.zeros_like(value) for name, value in theirs.items()}):
        with pytest.raises(MessageError, match="differ in model, encoder, reference or version"):
            codec.decode(message, KEY, reference=other)
        assert not codec.expects(message, other)


def test_all_fingerprints_differ() -> None:
    codecs = [QUANTISED.bind(AGREED), QUANTISED.bind(AGREED, attached={"c": AGREED["a"]})]
    codecs += [QUANTISED.bind(schema) for schema in OTHER_SCHEMAS.values()]
    codecs += [encoder.bind(AGREED) for encoder in OTHER_ENCODERS.values()]
    prints = [codec.fingerprint({}) for codec in codecs]
    assert len(set(prints)) == len(prints)


def test_what_gives_the_same_chains_is_the_same_schema() -> None:
    # another threshold that selects the same tensors is accepted
    for same_choice in (dataclasses.replace(QUANTISED, threshold=19), dataclasses.replace(QUANTISED, threshold=6)):
        back, _ = same_choice.bind(AGREED).decode(message_of(), KEY)
        assert back.keys() == AGREED.keys()


@pytest.mark.parametrize(
    "key", [Key(0, 2, 3), Key(1, 3, 3), Key(1, 2, 4), Key(1, 2, BROADCAST), Key(1, 2), Key(2**64 - 1, 2, 3)], ids=str
)
def test_another_key_is_refused(key: Key) -> None:
    with pytest.raises(MessageError, match=r"expected seed|seed 1, round 2, client 3"):
        QUANTISED.bind(AGREED).decode(message_of(), key)


def test_the_header_is_as_documented() -> None:
    message = message_of()
    fields = struct.unpack_from("<4sHH8sQIQQ", message)
    assert fields == (b"FEDQ", 4, 0, QUANTISED.bind(AGREED).fingerprint({}), 1, 2, 3, len(message) - 48)


def test_the_fingerprint_tells_what_differs_and_nothing_else() -> None:
    @dataclasses.dataclass(frozen=True)
    class UniformQuantizationOfTomorrow(UniformQuantization):
        tomorrow: int | None = None  # a new option

    UniformQuantizationOfTomorrow.__name__ = "UniformQuantization"

    def fingerprint(*stages: EncodingStage, **more: Any) -> bytes:
        schema = {"x": TensorSpec((20_000,), torch.float32)}
        return StateDictEncoder(Encoder(stages, FixedWidth()), **more).bind(schema).fingerprint({})

    equal = (UniformQuantization(), UniformQuantization(8), UniformQuantizationOfTomorrow())
    same = {fingerprint(stage) for stage in equal}
    assert len(same) == 1
    others = [
        fingerprint(UniformQuantization(7)),
        fingerprint(UniformQuantization(8, "nearest")),
        fingerprint(UniformQuantizationOfTomorrow(tomorrow=3)),
        fingerprint(UniformQuantization(), UniformQuantization()),
        fingerprint(UniformQuantization(), threshold=10**6),
        fingerprint(UniformQuantization(), joint=True),
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_arguments_that_repr_cannot_tell_apart_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Table(UniformQuantization):
        table: torch.Tensor | None = None

    with pytest.raises(TypeError, match="plain values"):
        Encoder([Table(table=wave(3))])


def test_equal_encoders_read_each_other() -> None:
    x = {"x": wave(100)}
    chains = [
        StateDictEncoder(Encoder([StepQuantization(step, relative=False)], CABAC()), 0)
        for step in (1, 1.0, np.float64(1))
    ]
    assert chains[0] == chains[1] == chains[2]
    messages = {chain.bind(schema_of(x)).encode(x, KEY).message for chain in chains}
    assert len(messages) == 1
    clipped = [StateDictEncoder(Encoder([TernGrad(clip)], FixedWidth()), 0).bind(schema_of(x)) for clip in (2, 2.0)]
    assert clipped[0].encode(x, KEY) == clipped[1].encode(x, KEY)
    other = StateDictEncoder(Encoder([StepQuantization(2, relative=False)], CABAC()), 0).bind(schema_of(x))
    with pytest.raises(MessageError, match="schema"):
        other.decode(messages.pop(), KEY)


# -------------------------------------------------------------------------------------- binding of a codec


def test_a_codec_bound_twice_sends_the_same_messages() -> None:
    stages = [PlusOneOverN(), RandomMask(0.5), UniformQuantization(8)]
    encoder = StateDictEncoder(Encoder(stages, FixedWidth()), 10, joint=True, common_scale=True)
    codecs = [encoder.bind(AGREED), encoder.bind(AGREED)]
    params = codecs[0].adaptation.params(codecs[0].adaptation.initial_state())
    for key in (KEY, KEY._replace(round=3), KEY):  # a codec remembers no earlier message
        first, second = (codec.encode(TENSORS, key, params).message for codec in codecs)
        assert first == second == encoder.bind(AGREED).encode(TENSORS, key, params).message
        decoded = [codec.decode(first, key, params).tensors for codec in codecs]
        assert all(torch.equal(decoded[0][name], decoded[1][name]) for name in TENSORS)


def test_the_order_of_the_tensors_given_does_not_matter() -> None:
    codec = QUANTISED.bind(AGREED, attached={"r": AGREED["a"], "s": AGREED["b"]})
    attached = {"r": wave(20), "s": wave(2, 3)}
    backwards = [dict(reversed(given.items())) for given in (TENSORS, attached)]
    message = codec.encode(backwards[0], KEY, attached=backwards[1]).message
    assert message == codec.encode(TENSORS, KEY, attached=attached).message
    back, front = codec.decode(message, KEY)
    assert (list(back), list(front)) == (list(TENSORS), list(attached))


OTHER_TENSORS = {
    "a name": ({"c": wave(20), "b": TENSORS["b"]}, "'c' is TensorSpec.*, the codec is bound to None"),
    "a shape": (TENSORS | {"a": wave(4, 5)}, r"'a' is TensorSpec\(shape=\(4, 5\).* bound to TensorSpec\(shape=\(20,\)"),
    "a dtype": (TENSORS | {"b": wave(2, 3).half()}, "'b' is TensorSpec.*float16.* bound to TensorSpec.*float32"),
    "one less": ({"a": TENSORS["a"]}, "'b' is None, the codec is bound to TensorSpec"),
    "one more": (TENSORS | {"c": wave(0)}, "'c' is TensorSpec.*, the codec is bound to None"),
}


@pytest.mark.parametrize("other", OTHER_TENSORS)
def test_tensors_of_another_schema_are_an_authors_error(other: str) -> None:
    given, text = OTHER_TENSORS[other]
    with pytest.raises(TypeError, match=f"^tensor {text}"):
        QUANTISED.bind(AGREED).encode(given, KEY)
    with pytest.raises(TypeError, match=f"^tensor {text}"):
        QUANTISED.bind({}, attached=AGREED).encode({}, KEY, attached=given)


def test_params_that_are_missing_are_an_authors_error() -> None:
    encoder = StateDictEncoder(Encoder([PlusOneOverN()]), 0, common_scale=True, rate_control=BitBudget(1))
    codec = encoder.bind(AGREED)
    params = codec.adaptation.params(codec.adaptation.initial_state())
    assert list(params) == ["a/0/addend", "b/0/addend", f"{RATE_CONTROL}/factor"]
    message = codec.encode(TENSORS, KEY, params).message
    for missing in params:
        some = {path: value for path, value in params.items() if path != missing}
        for given in (None, {}, some):
            with pytest.raises(TypeError, match="must be given their params: params="):
                codec.encode(TENSORS, KEY, given)
            with pytest.raises(TypeError, match="must be given their params: params="):
                codec.decode(message, KEY, given)
        with pytest.raises(TypeError, match="must be given their params: params="):
            encoder.bind(AGREED, attached=schema_of(some)).decode(message, KEY)
