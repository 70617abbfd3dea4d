"""A state_dict ↔ one message: exact tensors, compressed tensors, and refused tensors."""

import dataclasses
import math
import struct
from typing import Any

import pytest
import torch
from toys import Negate

from fedq.encoding import (
    CABAC,
    BitBudget,
    ClipByValue,
    EncodeError,
    Encoder,
    EncodingStage,
    FixedWidth,
    HadamardRotation,
    Key,
    MessageError,
    PowerSGD,
    RandomMask,
    Raw,
    ScaledSign,
    Shortest,
    SingularVectors,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    TopK,
    TrellisQuantization,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.codec import RATE_CONTROL
from fedq.encoding.message import OVERHEAD
from fedq.encoding.schema import Tensors
from fedq.encoding.testing import raw_bytes, reframe, wave

KEY = Key(1, 2, 3)
UINT8 = Encoder([UniformQuantization(8)], FixedWidth())


def state_dict() -> dict[str, torch.Tensor]:
    """Returns the tensors of a network with batch normalisation, and a tensor of every dtype."""
    return {
        "conv.weight": wave(4, 3, 5, 5),
        "conv.bias": wave(4),
        "bn.running_mean": wave(300) * 7,
        "bn.num_batches_tracked": torch.tensor(2**53 + 1),
        "mask": torch.arange(500) % 3 == 0,
        "pixels": torch.arange(600).to(torch.uint8),
        "table": (torch.arange(400) - 200) * (2**54 + 1),
        "half": wave(200, dtype=torch.float16),
        "brain": wave(200, dtype=torch.bfloat16),
        "double": wave(200, dtype=torch.float64),
        "nothing": torch.zeros(0, 7),
        "scalar": torch.tensor(math.pi),
    }


def sent(encoder: StateDictEncoder, tensors: dict[str, torch.Tensor], **options: Any) -> bytes:
    """Returns the message of `tensors`; `options` are options of Codec.encode."""
    return encoder.bind(schema_of(tensors)).encode(tensors, KEY, **options).message


def decoded(
    encoder: StateDictEncoder, message: bytes, tensors: dict[str, torch.Tensor], **options: Any
) -> dict[str, torch.Tensor]:
    """Returns the tensors that a receiver decodes; `options` are options of Codec.decode."""
    codec = encoder.bind(schema_of(tensors))
    back, front = codec.decode(message, KEY, **options)
    assert front == {}
    return back


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and raw_bytes(x) == raw_bytes(y)


def test_what_is_exact() -> None:
    tensors, encoder = state_dict(), StateDictEncoder(UINT8, threshold=100)
    back = decoded(encoder, sent(encoder, tensors), tensors)
    assert list(back) == list(tensors)
    assert {name for name in tensors if not same(back[name], tensors[name])} == {
        "conv.weight",
        "bn.running_mean",
        "half",
        "brain",
        "double",
    }
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        assert back[name].dtype == tensor.dtype


def test_parameters_that_require_gradients() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30))
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    encoder = StateDictEncoder(UINT8, threshold=100)
    back = decoded(encoder, sent(encoder, tensors), tensors)
    assert not any(tensor.requires_grad for tensor in back.values())
    module.load_state_dict(back)


def test_no_tensors_at_all() -> None:
    codec = StateDictEncoder().bind({})
    message, reports = codec.encode({}, KEY)
    assert (len(message), reports) == (OVERHEAD, {})
    assert codec.decode(message, KEY) == ({}, {})


def test_rules_by_name() -> None:
    tensors = {"a.weight": wave(500), "b.weight": wave(500), "a.bias": wave(5), "c.weight": wave(500)}
    three = Encoder([UniformQuantization(3, "nearest")], FixedWidth())
    encoder = StateDictEncoder(UINT8, 100, {"a.*": Encoder(), "*.weight": three, "b.weight": Encoder()})
    # the first pattern that matches counts, before the threshold; names are case-sensitive
    codec = encoder.bind(schema_of(tensors | {"A.bias": wave(5)}))
    chosen = {name: chain.encoder for name, chain in codec.chains.items()}
    assert chosen == {
        **dict.fromkeys(("a.weight", "a.bias", "A.bias"), Encoder()),
        **dict.fromkeys(("b.weight", "c.weight"), three),
    }
    assert len(sent(encoder, tensors)) == OVERHEAD + 2000 + 2 * (8 + 188) + 20
    small = StateDictEncoder(UINT8, 100, {"a.bias": UINT8})  # a rule counts before the threshold
    assert len(sent(small, {"a.bias": wave(5)})) == OVERHEAD + 8 + 5


def test_a_rule_that_quantises_a_counter_is_refused() -> None:
    encoder = StateDictEncoder(UINT8, rules={"*": UINT8})
    with pytest.raises(EncodeError, match=r"'bn.num_batches_tracked'.*int64"):
        sent(encoder, {"w": wave(3), "bn.num_batches_tracked": torch.tensor(7)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "half", "brain", "double", "scalar"])
def test_what_is_not_finite_is_named(name: str, value: float) -> None:
    tensors = state_dict()
    tensors[name].view(-1)[-1] = value
    with pytest.raises(EncodeError, match=f"'{name}'"):
        sent(StateDictEncoder(UINT8, threshold=100), tensors)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    with pytest.raises(EncodeError):
        sent(StateDictEncoder(), {"x": torch.tensor([math.inf, -math.inf, 1.0])})


def test_a_sum_that_overflows_is_no_infinity() -> None:
    for x in (torch.full((100,), 3e38), torch.full((100,), 6e4, dtype=torch.float16)):
        back = decoded(StateDictEncoder(), sent(StateDictEncoder(), {"x": x}), {"x": x})
        assert same(back["x"], x)


def test_a_range_too_wide_is_named() -> None:
    with pytest.raises(EncodeError, match=r"'wide'.*finite range"):
        sent(StateDictEncoder(UINT8, 0), {"wide": torch.tensor([-1e308, 1e308], dtype=torch.float64)})


def test_an_attached_tensor_that_is_not_finite_is_named() -> None:
    attached = {"rate": torch.tensor(math.nan)}
    codec = StateDictEncoder().bind(schema_of({"x": wave(3)}), attached=schema_of(attached))
    with pytest.raises(EncodeError, match="'rate'"):
        codec.encode({"x": wave(3)}, KEY, attached=attached)


def test_a_side_value_that_is_not_finite_is_not_sent() -> None:
    @dataclasses.dataclass(frozen=True)
    class Norm(EncodingStage):
        def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
            return {"norm": TensorSpec((), torch.float32)}

        def encode(self, x: torch.Tensor, key: Key) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            norm = x.square().sum()  # overflows
            return x / norm, {"norm": norm}

        def decode(self, y: torch.Tensor, side: dict[str, torch.Tensor], spec: TensorSpec, key: Key) -> torch.Tensor:
            return y * side["norm"]

    with pytest.raises(EncodeError, match=r"'big'.*Norm makes norm"):
        sent(StateDictEncoder(Encoder([Norm()]), 0), {"big": torch.tensor([1e38, 2e38])})


def test_attached_tensors_of_any_name() -> None:
    attached = {"rate": torch.tensor(0.5), "a/b": torch.arange(3), "a/b/c/d": torch.tensor([True])}
    codec = StateDictEncoder().bind(schema_of({"x": wave(3)}), attached=schema_of(attached))
    message = codec.encode({"x": wave(3)}, KEY, attached=attached).message
    assert len(message) == OVERHEAD + 12 + 4 + 24 + 1
    for params in (None, {}):
        back, front = codec.decode(message, KEY, params)
        assert same(back["x"], wave(3))
        assert list(front) == list(attached)
        assert all(same(front[name], attached[name]) for name in attached)
    with pytest.raises(MessageError, match="schema"):
        decoded(StateDictEncoder(), message, {"x": wave(3)})


def test_a_boolean_that_is_neither_is_refused() -> None:
    tensors = {"flags": torch.tensor([True, False, True])}
    message = sent(StateDictEncoder(), tensors)
    for byte in (2, 128, 255):
        with pytest.raises(MessageError, match=r"'flags'.*neither 0 nor 1"):
            decoded(StateDictEncoder(), reframe(message, bytes((1, byte, 0))), tensors)


SIDES = {"first": 8, "second": 16, "last": 8}


def test_one_byte_changes_one_tensor() -> None:
    tensors = {
        "first": wave(40),
        "counter": torch.tensor(12),
        "second": wave(6, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "last": wave(33),
    }
    encoder = StateDictEncoder(Encoder([UniformQuantization(3)], FixedWidth()), threshold=5)
    message = sent(encoder, tensors)
    sizes = {"first": 8 + 15, "counter": 8, "second": 16 + 3, "flags": 3, "last": 8 + 13}
    assert len(message) == OVERHEAD + sum(sizes.values())
    owners = [name for name, size in sizes.items() for _ in range(size)]
    sides = {name: range(owners.index(name), owners.index(name) + side) for name, side in SIDES.items()}
    before = decoded(encoder, message, tensors)
    body, refused = message[44:-4], 0
    for place, owner in enumerate(owners):
        for bit in (0, 3, 7):
            damaged = bytearray(body)
            damaged[place] ^= 1 << bit
            try:
                after = decoded(encoder, reframe(message, bytes(damaged)), tensors)
            except MessageError as error:
                assert f"{owner!r}" in str(error)  # noqa: PT017  not every damage is refused
                refused += 1
            else:
                changed = {name for name in tensors if not same(before[name], after[name])}
                # rounding may hide the last bits of a range
                assert changed == {owner} or (not changed and place in sides[owner])
    assert 0 < refused < len(owners)


def test_what_follows_the_rounds_is_given_its_params() -> None:
    with pytest.raises(TypeError, match="must be given their params: params="):
        sent(StateDictEncoder(Encoder([PowerSGD(2)]), 0), {"x": wave(10, 10)})


def test_a_chain_for_floats_is_no_riddle_where_it_meets_integers() -> None:
    """Every chain declares its summable prefix. A chain that takes no integers raises an error in `encode` only."""
    tensors = {"count": torch.tensor([3]), "a": wave(20)}
    encoder = StateDictEncoder(rules={"*": Encoder([HadamardRotation()], Raw())})
    assert encoder.bind(schema_of(tensors)).chains["a"].summable_prefix
    with pytest.raises(EncodeError, match="tensor 'count' cannot be encoded: HadamardRotation takes floating"):
        sent(encoder, tensors)


def test_each_tensor_has_random_numbers_of_its_own() -> None:
    x = wave(1000)
    encoder = StateDictEncoder(UINT8, threshold=10)
    message = sent(encoder, {"a": x, "b": x})
    body = message[44:-4]
    assert body[: len(body) // 2] != body[len(body) // 2 :]


def test_the_decoded_are_on_the_device_asked_for() -> None:
    tensors = {"x": wave(30)}
    encoder = StateDictEncoder(UINT8, threshold=10)
    back = decoded(encoder, sent(encoder, tensors), tensors, device="cpu")
    assert back["x"].device == torch.device("cpu")


def test_joint_encodes_one_vector() -> None:
    tensors = {"a": wave(20, 10), "bias": wave(7), "b": wave(300) * 9, "steps": torch.tensor(3), "empty": wave(0)}
    apart, joint = StateDictEncoder(UINT8, 100), StateDictEncoder(UINT8, 100, joint=True)
    message = sent(joint, tensors)
    assert len(message) == OVERHEAD + 8 + 500 + 7 * 4 + 8  # one range instead of two
    assert len(sent(apart, tensors)) == len(message) + 8
    back = decoded(joint, message, tensors)
    assert list(back) == list(tensors)
    by_hand, vector = StateDictEncoder(rules={"*": UINT8}), {"*": torch.cat((wave(200), wave(300) * 9))}
    together = decoded(by_hand, sent(by_hand, vector), vector)["*"]
    assert torch.equal(back["a"], together[:200].reshape(20, 10))
    assert torch.equal(back["b"], together[200:])
    for name in ("bias", "steps", "empty"):
        assert torch.equal(back[name], tensors[name])


def test_a_rule_with_the_same_encoder_is_a_rule() -> None:
    x = {"a": wave(50), "b": wave(60), "c": wave(70)}
    for own in (UINT8, dataclasses.replace(UINT8)):
        assert list(StateDictEncoder(UINT8, 10, {"b": own}, joint=True).bind(schema_of(x)).chains) == ["*", "b"]


def test_joint_leaves_rules_alone_and_refuses_two_dtypes() -> None:
    tensors = {"a": wave(200), "b": wave(300), "c": wave(400)}
    encoder = StateDictEncoder(UINT8, 100, {"b": Encoder()}, joint=True)
    back = decoded(encoder, sent(encoder, tensors), tensors)
    assert torch.equal(back["b"], tensors["b"])
    assert not torch.equal(back["a"], tensors["a"])
    with pytest.raises(ValueError, match="different dtypes"):
        encoder.bind(schema_of(tensors | {"c": wave(400).half()}))


def test_a_joint_message_with_nan_names_the_tensor() -> None:
    with pytest.raises(EncodeError, match="'b'"):
        sent(StateDictEncoder(UINT8, 1, joint=True), {"a": wave(5), "b": torch.tensor([0.0, math.nan])})


# ---------------------------------------------------------------------------- common scale and reference

STEPS = Encoder([StepQuantization(0.5, relative=False)], CABAC())
COMMON = StateDictEncoder(STEPS, threshold=10, common_scale=True)


def round_trip(encoder: StateDictEncoder, tensors: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, torch.Tensor]]:
    before = {name: raw_bytes(tensor) for name, tensor in tensors.items()}
    message = sent(encoder, tensors)
    back = decoded(encoder, message, tensors)
    assert schema_of(back) == schema_of(tensors)
    assert {name: raw_bytes(tensor) for name, tensor in tensors.items()} == before
    return message, back


def test_a_common_scale_is_the_root_mean_square_of_what_goes_through_stages() -> None:
    tensors = {"a": wave(20, 30), "b": wave(400) * 9, "small": wave(7) * 1e9, "n": torch.arange(99) * 10**9}
    message, back = round_trip(COMMON, tensors)
    both = torch.cat([tensors["a"].reshape(-1), tensors["b"]]).double()
    (scale,) = struct.unpack_from("<f", message, 44)
    assert scale == pytest.approx(float(both.square().mean().sqrt()), rel=1e-6)
    for name in "ab":
        assert float((back[name] - tensors[name]).abs().max()) <= 0.2501 * scale
    assert same(back["small"], tensors["small"]) and same(back["n"], tensors["n"])


@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-40, 1e-30, 1e18, 1e37])
def test_a_common_scale_of_any_size(factor: float) -> None:
    tensors = {"a": wave(20, 30) * factor, "b": torch.zeros(50), "e": torch.zeros(0, 20), "c": wave(40) * factor * 1e-3}
    _, back = round_trip(COMMON, tensors)
    error = max(float((back[name] - tensors[name]).abs().max()) for name in "abc")
    assert error <= max(0.2 * factor, 1.2e-38)
    assert error <= 1.5 * factor
    limits = {"a": torch.tensor([3.4e38, -3.4e38] * 10), "b": torch.zeros(30)}
    assert round_trip(COMMON, limits)[1]["a"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_common_scale_in_every_dtype(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for factor in (1.0, limit / 2, 6e-8):
        tensors = {"a": (wave(300, dtype=torch.float64) * factor).to(dtype), "f": wave(200) * 1e-9}
        if dtype == torch.float64 and factor > 1e200:  # the sum of squares is infinite
            with pytest.raises(EncodeError, match="tensor 'a' is too large for a common scale"):
                sent(COMMON, tensors)
            continue
        _, back = round_trip(COMMON, tensors)
        assert float((back["a"].double() - tensors["a"].double()).abs().max()) <= 0.16 * factor
    # an element that is rounded up is clamped to the dtype's limit
    largest = {"a": torch.tensor([limit if dtype != torch.float64 else 1e150] * 15 + [0.0] * 5, dtype=dtype)}
    assert round_trip(COMMON, largest)[1]["a"].isfinite().all()
    tiny = {"a": wave(50, dtype=torch.float64) * 1e-100, "b": wave(50)}
    assert len(round_trip(COMMON, tiny)[0]) > 48
    alone = {"a": wave(50, dtype=torch.float64) * 1e-100}
    assert float((round_trip(COMMON, alone)[1]["a"] - alone["a"]).abs().max()) < 0.2e-100


def test_a_common_scale_leaves_integers_with_rules_to_their_chains() -> None:
    encoder = StateDictEncoder(STEPS, 10, rules={"n": Encoder([Negate()])}, common_scale=True)
    tensors = {"n": torch.arange(30), "a": wave(40) * 5}
    assert same(round_trip(encoder, tensors)[1]["n"], tensors["n"])
    with pytest.raises(EncodeError, match="tensor 'n' cannot be encoded: .*floating"):
        sent(StateDictEncoder(rules={"*": STEPS}, common_scale=True), tensors)
    assert round_trip(StateDictEncoder(common_scale=True), tensors)[1]["a"].equal(tensors["a"])  # no tensor is scaled


def test_a_common_scale_joint_and_partly() -> None:
    tensors = {"a": wave(20, 30), "n": torch.arange(30), "b": wave(400) * 9}
    joint = dataclasses.replace(COMMON, joint=True)
    _, back = round_trip(joint, tensors)
    plain = round_trip(COMMON, tensors)[1]
    assert all(torch.equal(back[name], plain[name]) for name in tensors)
    for encoder in (COMMON, joint):
        part = decoded(encoder, sent(encoder, tensors), tensors, stop_at_sum=True)
        total = {name: 2.0 * tensor for name, tensor in part.items()}
        whole = encoder.bind(schema_of(tensors)).decode_sum(total, KEY, {})
        assert all(torch.equal(whole[name], 2.0 * plain[name]) for name in tensors)


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_scales_that_are_none_are_refused(scale: float) -> None:
    tensors = {"a": wave(20, 30)}
    message = sent(COMMON, tensors)
    body = struct.pack("<f", scale) + message[48:-4]
    with pytest.raises(MessageError, match="common scale"):
        decoded(COMMON, reframe(message, body), tensors)
    for odd in (1e-45, 3e38):
        back = decoded(COMMON, reframe(message, struct.pack("<f", odd) + body[4:]), tensors)
        assert back["a"].isfinite().all()


def test_one_step_for_all_is_shorter_than_a_step_for_each_at_the_same_error() -> None:
    draw = torch.Generator().manual_seed(1)
    sigmas = (0.05, 0.3, 1.0, 4.0)
    tensors = {f"{sigma}": sigma * torch.randn(100, 200, generator=draw) for sigma in sigmas}

    def measured(encoder: StateDictEncoder) -> tuple[int, float]:
        message, back = round_trip(encoder, tensors)
        return len(message), sum(float((back[name] - tensors[name]).square().sum()) for name in tensors)

    def own(step: float) -> StateDictEncoder:
        return StateDictEncoder(Encoder([StepQuantization(step)], CABAC()), 10)

    size, error = measured(COMMON)
    low, high = 0.01, 4.0
    for _ in range(25):  # search the largest relative step with no larger error
        middle = math.sqrt(low * high)
        low, high = (middle, high) if measured(own(middle))[1] <= error else (low, middle)
    assert measured(own(low))[1] == pytest.approx(error, rel=0.02)
    assert size < 0.6 * measured(own(low))[0]


def test_a_reference_is_taken_away_and_added() -> None:
    initial = {"a": wave(20, 30) * 100, "n": torch.arange(30), "small": wave(3), "h": wave(30, dtype=torch.float16)}
    tensors = {"a": initial["a"] + wave(20, 30), "n": torch.arange(30) + 5, "small": wave(3) + 1, "h": initial["h"] + 1}
    plain = StateDictEncoder(STEPS, threshold=10)
    for joint, common in ((False, False), (False, True)):
        encoder = dataclasses.replace(plain, joint=joint, common_scale=common, reference="initial")
        message = sent(encoder, tensors, reference=initial)
        back = decoded(encoder, message, tensors, reference=initial)
        difference = {name: tensors[name] - initial[name] for name in tensors}
        other = dataclasses.replace(encoder, reference="none")
        own, apart = round_trip(other, difference)
        assert message[44:60] == own[44:60] if common else message[44:-4][:20] == own[44:-4][:20]
        for name in ("a", "h"):
            assert torch.equal(back[name], initial[name] + apart[name])
        assert torch.equal(back["n"], tensors["n"]) and torch.equal(back["small"], tensors["small"])
        assert len(message) < len(sent(plain, tensors))
        with pytest.raises(MessageError, match="schema"):
            decoded(other, message, tensors)
    joined = StateDictEncoder(STEPS, 100, joint=True, reference="initial")
    two, start = {"a": tensors["a"], "b": wave(200)}, {"a": initial["a"], "b": wave(200) + 3}
    back = decoded(joined, sent(joined, two, reference=start), two, reference=start)
    assert all(float((back[name] - two[name]).abs().max()) <= 0.2501 for name in two)


def test_a_reference_that_is_missing_or_of_another_shape_is_an_authors_error() -> None:
    encoder, tensors = dataclasses.replace(COMMON, reference="initial"), {"a": wave(20, 30)}
    message = sent(encoder, tensors, reference=tensors)
    for wrong in (None, {}, {"a": wave(30)}, {"a": wave(20, 1)}, {"a": wave(20, 30, dtype=torch.float64)}):
        with pytest.raises(TypeError, match="reference"):
            sent(encoder, tensors, reference=wrong)
        with pytest.raises(TypeError, match="reference"):
            decoded(encoder, message, tensors, reference=wrong)
    with pytest.raises(TypeError, match="reference"):
        decoded(encoder, message, tensors, reference=tensors, stop_at_sum=True)
    with pytest.raises(ValueError, match="must be none, initial or last"):
        StateDictEncoder(reference="first")
    far = {"a": torch.full((20, 30), 3e38)}
    with pytest.raises(EncodeError, match="'a' holds NaN or infinity"):
        sent(encoder, far, reference={"a": -far["a"]})


def test_a_frontier_message_of_a_whole_model() -> None:
    vectors = SingularVectors(1.0, 8, 0.1)
    steps = StepQuantization(1.0, relative=False, rate_weight=0.1, centroids=True)
    encoder = StateDictEncoder(Encoder([vectors, steps], CABAC()), 0, common_scale=True)
    message, back = round_trip(encoder, state_dict() | {"low": wave(200, 1) @ wave(1, 300)})
    assert torch.equal(back["mask"], state_dict()["mask"])
    assert len(message) < 60_000


def test_a_sum_with_the_reference_stays_within_the_dtype() -> None:
    reference = {"x": torch.full((1000,), 6e4, dtype=torch.float16)}
    x = {"x": torch.cat([torch.full((500,), -2e3), torch.full((500,), 6.2e4)]).half()}
    encoder = StateDictEncoder(Encoder([ScaledSign()], FixedWidth()), 0, reference="initial")
    # the differences are −62,000 and 2,000, and their decoded values are about ±32,000
    back = decoded(encoder, sent(encoder, x, reference=reference), x, reference=reference)
    assert float(back["x"].max()) == torch.finfo(torch.float16).max


@pytest.mark.parametrize("stage", [StepQuantization(1e39, relative=False), TrellisQuantization(1e39, relative=False)])
def test_a_step_beyond_float32_is_no_infinity(stage: Any) -> None:
    x = {"x": wave(100) * 1e38}
    encoder = StateDictEncoder(Encoder([stage], CABAC(signed=isinstance(stage, StepQuantization))), 0)
    assert bool(decoded(encoder, sent(encoder, x), x)["x"].isfinite().all())


def test_a_common_scale_does_not_depend_on_layout_or_threads() -> None:
    whole = torch.randn(900, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chain = Encoder([StepQuantization(1.0, relative=False)], CABAC())
    encoder, before = StateDictEncoder(chain, 0, common_scale=True), torch.get_num_threads()
    messages = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for x in (whole[:, ::2], whole[:, ::2].contiguous()):
                messages.add(sent(encoder, {"x": x}))
    finally:
        torch.set_num_threads(before)
    assert len(messages) == 1


def test_a_conjugate_view_is_sent_as_what_it_shows() -> None:
    x = {"x": torch.randn(4, dtype=torch.complex64).conj()}
    back = decoded(StateDictEncoder(), sent(StateDictEncoder(), x), x)
    assert torch.equal(back["x"], x["x"].resolve_conj())


@pytest.mark.parametrize(
    "encoder", [Encoder(), Encoder([UniformQuantization(16)], FixedWidth())], ids=["exact", "16 bits"]
)
def test_a_negated_view_is_sent_as_what_it_shows(encoder: Encoder) -> None:
    """The imaginary part of a conjugate is such a view."""
    x = {"x": torch.randn(1, dtype=torch.complex64).conj().imag}  # one element: several would be copied on the way
    assert x["x"].is_neg()
    one = StateDictEncoder(encoder, 0)
    back = decoded(one, sent(one, x), x)
    assert (back["x"] - x["x"].resolve_neg()).abs().max() < 1e-3


def test_a_common_scale_of_two_precisions() -> None:
    """With a float64 tensor the scale is float64 and may exceed float32. A float32 tensor is then decoded as 0."""
    chain = StateDictEncoder(Encoder([StepQuantization(0.5, relative=False)], CABAC()), 0, common_scale=True)
    huge = {"a": torch.ones(4), "b": torch.tensor([1e60, -1e60, 1e60, 0], dtype=torch.float64)}
    back = decoded(chain, sent(chain, huge), huge)
    assert back["a"].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(back["b"], huge["b"], rtol=0.35, atol=0)
    tiny = {"a": torch.zeros(4), "b": torch.full((4,), 1e-50, dtype=torch.float64)}
    back = decoded(chain, sent(chain, tiny), tiny)
    assert back["a"].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(back["b"], tiny["b"], rtol=0.35, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_travels_exact(dtype: torch.dtype) -> None:
    x = {"x": torch.arange(-4, 5).float().to(dtype)}
    encoder = StateDictEncoder(UINT8, threshold=0)
    back = decoded(encoder, sent(encoder, x), x)
    assert back["x"].dtype == dtype
    assert back["x"].float().tolist() == list(range(-4, 5))
    with pytest.raises(EncodeError, match="'x' holds NaN"):
        sent(StateDictEncoder(), {"x": torch.tensor([1.0, math.nan]).to(dtype)})
    with pytest.raises(EncodeError, match="'x' cannot be encoded: UniformQuantization takes floating tensors of 16"):
        sent(StateDictEncoder(rules={"x": UINT8}), x)


def test_what_is_beyond_its_dtype_by_the_common_scale_is_named() -> None:
    chain = StateDictEncoder(STEPS, threshold=0, common_scale=True, rate_control=BitBudget(16))
    params = {f"{RATE_CONTROL}/factor": torch.tensor(1e-6)}
    with pytest.raises(EncodeError, match="'x' overflows torch.float16 once divided by the common scale"):
        sent(chain, {"x": wave(100).half()}, params=params)


@pytest.mark.parametrize(
    "chain",
    [
        Encoder([RandomMask(0.3)]),
        Encoder([ClipByValue(1.0)]),
        Encoder([PowerSGD(2)]),
        Encoder([Negate()]),
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinity_on_the_wire_is_not_cut_off_but_refused(chain: Encoder, bad: float) -> None:
    x = {"x": wave(20, 30)}
    encoder = StateDictEncoder(chain, threshold=0, common_scale=True)
    adaptation = encoder.bind(schema_of(x)).adaptation
    params = adaptation.params(adaptation.initial_state())
    message = sent(encoder, x, params=params)
    body = message[44:-4]
    for damaged in (body[:-4] + struct.pack("<f", bad), body[:4] + struct.pack("<f", bad) + body[8:]):
        with pytest.raises(MessageError, match="NaN or infinite"):
            decoded(encoder, reframe(message, damaged), x, params=params)


def test_tensors_of_two_dtypes_are_not_joined() -> None:
    joint = StateDictEncoder(Encoder([TopK(0.1)]), 10, joint=True)
    with pytest.raises(EncodeError, match="tensors of different dtypes cannot be joined"):
        joint.bind(schema_of({"a": wave(100), "b": wave(100).half()}))


def test_what_is_no_stage_or_coder_is_refused() -> None:
    with pytest.raises(TypeError, match=r"FixedWidth\(\) is not a stage"):
        Encoder([FixedWidth()])
    with pytest.raises(TypeError, match="ScaledSign.* is not a coder"):
        Encoder([], ScaledSign())
    with pytest.raises(ValueError, match="FixedWidth must stand behind a stage"):
        Encoder([], FixedWidth())
    with pytest.raises(TypeError, match="ScaledSign.* is not a coder"):
        Shortest([ScaledSign()])
    with pytest.raises(TypeError, match="is not a rate controller"):
        StateDictEncoder(common_scale=True, rate_control=FixedWidth())


def test_the_frame_has_at_most_64_bytes():
    """A message without tensors is its frame alone."""
    message = StateDictEncoder().bind({}).encode({}, Key(0)).message
    assert len(message) == OVERHEAD <= 64


@dataclasses.dataclass(frozen=True)
class Overflows(EncodingStage):
    def encode(self, x: torch.Tensor, key: Key) -> tuple[torch.Tensor, Tensors]:
        return x, {}

    def decode(self, y: torch.Tensor, side: Tensors, spec: TensorSpec, key: Key) -> torch.Tensor:
        return y / 0


def test_a_stage_that_decodes_to_infinity_is_refused() -> None:
    tensors = {"a": torch.ones(3)}
    codec = StateDictEncoder(Encoder([Overflows()], Raw()), 0).bind(schema_of(tensors))
    message = codec.encode(tensors, KEY).message
    with pytest.raises(MessageError, match="tensor 'a' cannot be decoded: a value is NaN or infinite"):
        codec.decode(message, KEY)
