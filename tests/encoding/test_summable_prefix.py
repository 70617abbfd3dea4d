"""Stages that commute with the sum are decoded once for all clients."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from configured import NAMES, built
from torch import Tensor
from toys import Negate, PlusOneOverN, Reverse, Statistics

from fedq.encoding import (
    BROADCAST,
    AdaptiveEncodingStage,
    Codec,
    Encoder,
    EncodingStage,
    FixedWidth,
    HadamardRotation,
    KashinRepresentation,
    Key,
    MessageError,
    RandomMask,
    RandomSubspace,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    UniformQuantization,
    schema_of,
    testing,
)
from fedq.encoding.testing import raw_bytes, reframe, wave

SUMMED = ("cosine", "hadamard", "kashin", "low_rank")  # encoders of conf/encoder whose sum is decoded once
ROUND = Key(1, 2)
COHORT = {3: 1, 7: 20, 2**40: 300}  # client number → weight
UNIFORM = UniformQuantization(4)
SHARED = RandomMask(0.3, shared=True)
ROTATED = Encoder([HadamardRotation(), UNIFORM], FixedWidth())


@dataclass(frozen=True)
class Narrow(EncodingStage):
    """Claims to commute, which is true except for rounding. Gives float32."""

    commutes_with_sum = True

    def encoded_spec(self, spec: TensorSpec, side: dict[str, Tensor]) -> TensorSpec:
        return TensorSpec(spec.shape, torch.float32)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.to(torch.float32, copy=True), {}

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y.to(spec.dtype, copy=True)


@dataclass(frozen=True)
class Doubles(AdaptiveEncodingStage):
    """Multiplies x by a factor of the server that doubles every round.

    With a `fault`, the stage claims to commute, but its result is off by the fault.
    """

    fault: float = 0.0

    commutes_with_sum = True

    def initial_state(self, spec: TensorSpec) -> dict[str, Tensor]:
        return {"factor": torch.tensor(1.0)}

    def params(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def update_state(self, state: dict[str, Tensor], aggregated: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"factor": state["factor"] * 2}

    def encode(
        self, x: Tensor, key: Key, params: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        return x * params["factor"], {}, {}

    def decode(
        self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key, params: dict[str, Tensor]
    ) -> Tensor:
        return (y / params["factor"] + self.fault).to(spec.dtype)


def first_params(codec: Codec) -> dict[str, Tensor]:
    return codec.adaptation.params(codec.adaptation.initial_state())


def cohort_of(tensors: dict[str, Tensor], codec: Codec) -> dict[int, tuple[dict, dict]]:
    """Returns for each client the decoded tensors and the summable tensors, in the first round."""
    params, cohort = first_params(codec), {}
    for client in COHORT:
        own = {name: tensor.roll(client % 10) for name, tensor in tensors.items()}
        key = ROUND._replace(client=client)
        message = codec.encode(own, key, params).message
        whole, _ = codec.decode(message, key, params)
        part, _ = codec.decode(message, key, params, stop_at_sum=True)
        finished = codec.decode_sum({name: tensor.clone() for name, tensor in part.items()}, key, params)
        assert list(finished) == list(whole) == list(tensors)
        for name in tensors:
            assert whole[name].dtype == finished[name].dtype == tensors[name].dtype
            assert raw_bytes(whole[name]) == raw_bytes(finished[name])
        cohort[client] = whole, part
    return cohort


def weighted_sum(tensors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up as a server does: floating tensors in their own dtype, all others in int64."""
    total = {}
    for name, first in tensors[0].items():
        dtype = first.dtype if first.is_floating_point() else torch.int64
        total[name] = sum(
            (own[name].to(dtype) * weight for own, weight in zip(tensors, COHORT.values(), strict=True)),
            start=torch.zeros(first.shape, dtype=dtype),
        )
    return total


@pytest.mark.parametrize(
    ("stages", "dtype", "expected"),
    [
        ([], torch.float32, 0),
        ([HadamardRotation(), UNIFORM], torch.float32, 1),
        ([HadamardRotation(), UNIFORM], torch.float64, 1),
        ([HadamardRotation(), UNIFORM], torch.float16, 0),  # a weighted sum would be clamped to 65504
        ([HadamardRotation(), UNIFORM], torch.bfloat16, 0),
        ([HadamardRotation(shared=False), UNIFORM], torch.float32, 0),
        ([HadamardRotation(), KashinRepresentation(), UNIFORM], torch.float32, 2),
        ([SHARED, HadamardRotation(shared=False), SHARED], torch.float32, 1),
        ([RandomMask(0.3), HadamardRotation()], torch.float32, 0),
        ([RandomSubspace(2), SHARED], torch.float32, 2),
        ([StepQuantization(0.1, relative=False)], torch.float32, 0),  # the stages commute, but give integers
        ([Negate(), StepQuantization(0.1, relative=False), Negate()], torch.float32, 1),
        ([Negate()], torch.int64, 0),
        ([Narrow(), Negate()], torch.float32, 2),
        ([Narrow(), Negate()], torch.float64, 0),
        ([Negate(), Narrow()], torch.float64, 1),
        ([Doubles(), UNIFORM], torch.float32, 1),
        ([PlusOneOverN(), Doubles()], torch.float32, 0),
    ],
    ids=str,
)
def test_how_far_a_sum_can_be_taken(stages: list[EncodingStage], dtype: torch.dtype, expected: int) -> None:
    encoder, x = Encoder(stages), torch.arange(600).reshape(30, 20).to(dtype)
    specs = encoder.bind(TensorSpec.of(x)).summable_prefix
    assert len(specs) == expected
    assert encoder.bind(TensorSpec.of(x), summable=False).summable_prefix == []
    # the specs are of the inputs of the stages
    for (y, _, _), spec in zip(testing.chain.steps(encoder, x), specs[1:], strict=False):
        assert TensorSpec.of(y) == spec
    assert specs[:1] in ([], [TensorSpec.of(x)])


TENSORS = {
    "a": wave(60, 70),
    "bias": wave(70),
    "counter": torch.tensor(2**40 + 1),
    "b": wave(5000) * 3 + 1,
    "mask": torch.arange(2000) % 3 == 0,
}


def configured_upload(name: str, joint: bool) -> Codec:
    upload = built(name, "upload")
    return StateDictEncoder(upload.encoder, 1000, upload.rules, joint).bind(schema_of(TENSORS))


@pytest.mark.parametrize("joint", [False, True])
def test_configured_fronts(joint: bool) -> None:
    found = {name: configured_upload(name, joint).chains.values() for name in NAMES}
    assert tuple(name for name in NAMES if any(chain.summable_prefix for chain in found[name])) == SUMMED


@pytest.mark.parametrize("name", [*SUMMED, "uint8", "powersgd"])
@pytest.mark.parametrize("joint", [False, True])
def test_configured_uploads(name: str, joint: bool) -> None:
    codec, tensors = configured_upload(name, joint), TENSORS
    cohort = cohort_of(tensors, codec)
    whole, part = (weighted_sum([client[i] for client in cohort.values()]) for i in (0, 1))
    once = codec.decode_sum(part, ROUND, first_params(codec))
    assert part.keys() == codec.chains.keys()
    for tensor in ("a", "bias", "b"):
        assert float((once[tensor] - whole[tensor]).norm()) <= 1e-5 * float(whole[tensor].norm()), tensor
    for tensor in ("counter", "mask"):
        assert once[tensor] is part[tensor]
        assert torch.equal(once[tensor], whole[tensor])
    for tensor, chain in codec.chains.items():
        if not chain.summable_prefix and tensor != "*":
            assert once[tensor] is part[tensor]  # no stage commutes


def test_a_sum_against_matrices() -> None:
    # unit vectors give the linear map; applied to the sum of the messages, it must give the decoded sum
    encoder, n = StateDictEncoder(Encoder([SHARED, HadamardRotation(block=16), Reverse()]), 0), 50
    codec = encoder.bind({"x": TensorSpec((n,), torch.float64)})
    updates = {client: wave(n, dtype=torch.float64).roll(client % 10) for client in COHORT}
    unit = [codec.encode({"x": row}, ROUND).message for row in torch.eye(n, dtype=torch.float64)]
    columns = np.stack([np.frombuffer(message[44:-4]) for message in unit], 1)  # the payload of each unit vector
    sent = columns @ sum((weight * updates[client] for client, weight in COHORT.items())).numpy()
    parts = []
    for client in COHORT:
        key = ROUND._replace(client=client)
        message = codec.encode({"x": updates[client]}, key).message
        parts.append(codec.decode(message, key, stop_at_sum=True).tensors)
    total = weighted_sum(parts)
    np.testing.assert_allclose(total["x"].numpy(), sent, rtol=1e-12, atol=1e-12)
    # kept elements are decoded as s times as large, where s, 3 or 4, is the size of the cell
    kept = (columns**2).sum(0) > 0.5
    once = codec.decode_sum(total, ROUND, {})["x"].numpy()
    summed = sum((weight * updates[client] for client, weight in COHORT.items())).numpy()
    assert np.count_nonzero(kept) == 15
    np.testing.assert_allclose(once[~kept], 0, atol=1e-12)
    np.testing.assert_allclose(once[kept] / summed[kept], [4] * 5 + [3] * 10, rtol=1e-9)


@pytest.mark.parametrize("client", [0, 12, BROADCAST])
def test_any_client_of_the_round_can_finish(client: int) -> None:
    tensors = {"x": wave(300)}
    codec = StateDictEncoder(ROTATED, 100).bind(schema_of(tensors))
    part = weighted_sum([part for _, part in cohort_of(tensors, codec).values()])
    once = codec.decode_sum(part, ROUND._replace(client=client), {})
    assert torch.equal(once["x"], codec.decode_sum(part, ROUND, {})["x"])
    for other in (Key(1, 3), Key(2, 2)):
        assert not torch.allclose(once["x"], codec.decode_sum(part, other, {})["x"])


def test_the_joint_vector_is_split_once() -> None:
    tensors = {"a": wave(20, 10), "bias": wave(7), "b": wave(300) * 9, "steps": torch.tensor(3)}
    codec = StateDictEncoder(ROTATED, 100, joint=True).bind(schema_of(tensors))
    cohort = cohort_of(tensors, codec)
    part = weighted_sum([part for _, part in cohort.values()])
    assert {name: tuple(tensor.shape) for name, tensor in part.items()} == {"*": (500,), "bias": (7,), "steps": ()}
    once, whole = codec.decode_sum(part, ROUND, {}), weighted_sum([whole for whole, _ in cohort.values()])
    assert {name: tensor.shape for name, tensor in once.items()} == {name: t.shape for name, t in tensors.items()}
    for name in tensors:
        torch.testing.assert_close(once[name], whole[name], rtol=1e-4, atol=1e-2)
    assert int(once["steps"]) == 3 * sum(COHORT.values())


def test_stages_behind_the_sum_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = HadamardRotation.decode
    monkeypatch.setattr(HadamardRotation, "decode", lambda *given: calls.append(given) or decode(*given))
    tensors = {"x": wave(300)}
    codec = StateDictEncoder(ROTATED, 100).bind(schema_of(tensors))
    message = codec.encode(tensors, ROUND).message
    part, _ = codec.decode(message, ROUND, stop_at_sum=True)
    assert calls == []
    before = part["x"].clone()
    codec.decode_sum(part, ROUND, {})
    assert len(calls) == 1
    assert torch.equal(part["x"], before)  # decoding does not change the sum
    codec.decode(message, ROUND)
    assert len(calls) == 2


def test_an_adaptive_stage_takes_its_params_after_the_sum() -> None:
    tensors, encoder = {"x": wave(300)}, StateDictEncoder(Encoder([Doubles(), HadamardRotation()]), 100)
    codec = encoder.bind(schema_of(tensors))
    state = codec.adaptation.initial_state()
    for factor in (1, 2, 4):
        params = codec.adaptation.params(state)
        message = codec.encode(tensors, ROUND, params).message
        part, _ = codec.decode(message, ROUND, params, stop_at_sum=True)
        assert float(part["x"].norm()) == pytest.approx(factor * float(tensors["x"].norm()), rel=1e-5)
        torch.testing.assert_close(codec.decode_sum(part, ROUND, params)["x"], tensors["x"])
        state = codec.adaptation.update_state(state, {})
    # params in the message are attached as in other messages
    params = {"x/0/factor": torch.tensor(8.0)}
    attaching = encoder.bind(schema_of(tensors), attached=schema_of(params))
    whole, _ = attaching.decode(attaching.encode(tensors, ROUND, params, attached=params).message, ROUND)
    torch.testing.assert_close(whole["x"], tensors["x"])


def test_attached_tensors_arrive_with_a_part() -> None:
    tensors, encoder = {"a": wave(300)}, StateDictEncoder(Encoder([HadamardRotation(), Statistics()]), 100)
    codec = encoder.bind(schema_of(tensors), reports=True)
    params = first_params(codec)
    message = codec.encode(tensors, ROUND, params).message
    _, reports = codec.decode(message, ROUND, params, stop_at_sum=True)
    assert list(reports) == list(codec.adaptation.report_schema)
    assert int(reports["a/1/count"]) == 300


@pytest.mark.parametrize("chain", [Encoder(), ROTATED, Encoder([SHARED]), Encoder([UNIFORM], FixedWidth())], ids=str)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_sum_that_is_not_finite_is_named(chain: Encoder, joint: bool, value: float) -> None:
    tensors = {"small": wave(5), "x": wave(300)}
    codec = StateDictEncoder(chain, 100, joint=joint).bind(schema_of(tensors))
    name = "*" if joint else "x"
    part, _ = codec.decode(codec.encode(tensors, ROUND).message, ROUND, stop_at_sum=True)
    part[name][-1] = value
    with pytest.raises(MessageError, match=f"'[{name}]'.*NaN or infinite"):
        codec.decode_sum(part, ROUND, {})


def test_what_is_not_finite_is_refused_before_the_sum() -> None:
    # the mask would turn infinity into 3e38, the dtype's largest value
    tensors = {"x": wave(300)}
    codec = StateDictEncoder(Encoder([SHARED]), 100).bind(schema_of(tensors))
    message = codec.encode(tensors, ROUND).message
    for value in (math.inf, -math.inf, math.nan):
        body = np.frombuffer(message[44:-4], np.float32).copy()
        body[17] = value
        for stop_at_sum in (False, True):
            with pytest.raises(MessageError, match="'x'.*NaN or infinite"):
                codec.decode(reframe(message, body.tobytes()), ROUND, stop_at_sum=stop_at_sum)


# ------------------------------------------------------------------------------------------------ the battery


@dataclass(frozen=True)
class Halves(EncodingStage):
    """Commutes in float64, the dtype in which the battery tests a stage, but not in a chain with float32."""

    commutes_with_sum = True

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.clone(), {}

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y.clone() if spec.dtype == torch.float64 else y.clamp(-2, 2)


@dataclass(frozen=True)
class Beside(Halves):
    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec((), torch.float32)}

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.clone(), {"scale": torch.tensor(1.0)}


FOUND = {
    Halves(): "decoded after the sum over clients, it is off",
    Beside(): "side values",
    Doubles(0.1): "does not commute",
}


@pytest.mark.parametrize("liar", FOUND, ids=str)
def test_the_battery_finds(liar: EncodingStage | AdaptiveEncodingStage) -> None:
    with pytest.raises(AssertionError, match=FOUND[liar]):
        testing.checks.check_commutes_with_sum(Encoder([liar]), None)


def test_the_battery_takes_an_adaptive_stage_that_commutes() -> None:
    testing.checks.check_commutes_with_sum(Encoder([Doubles(), HadamardRotation(), UNIFORM], FixedWidth()), None)
