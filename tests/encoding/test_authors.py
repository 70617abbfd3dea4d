"""A wrong stage raises a clear error early. See also test_adaptive and test_battery."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import PlusOneOverN, Statistics

from fedq.encoding import (
    AdaptiveEncodingStage,
    EncodeError,
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    Raw,
    StateDictEncoder,
    StateUpdate,
    TensorSpec,
    schema_of,
    testing,
)
from fedq.encoding.testing import KEY, check_stage, wave

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Identity(EncodingStage):
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        return x.clone(), {}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return y.clone()


@dataclass(frozen=True)
class Adapts(AdaptiveEncodingStage):
    """Sends x exact. Its params are the largest sum that a client has reported."""

    lossless = True

    def initial_state(self, spec: TensorSpec) -> Tensors:
        return {"largest": torch.tensor(0.0)}

    def params(self, state: Tensors) -> Tensors:
        return state

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        return {"sum": StateUpdate(TensorSpec((), torch.float32), "max")}

    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        return {"largest": torch.maximum(state["largest"], aggregated["sum"])}

    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        return x.clone(), {}, {"sum": x.clamp(-1, 1).float().abs().sum()}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        return y.clone()


@dataclass(frozen=True)
class Norm(Identity):
    """Refuses a tensor whose sum of squares overflows, as a stage may."""

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        if not float(x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()) < torch.inf:
            raise ValueError("the sum of squares overflows")
        return x.clone(), {}


def test_what_is_right_passes() -> None:
    check_stage(Norm(), lambda x: 0)
    check_stage(Identity(), lambda x: 0)
    check_stage(Adapts(), lambda x: 0)
    check_stage(PlusOneOverN())


# ----------------------------------------------------------------------------- errors of a stage at run time


def sends(stage: EncodingStage | AdaptiveEncodingStage, x: Tensor) -> Tensor:
    codec = StateDictEncoder(rules={"x": Encoder([stage])}).bind(schema_of({"x": x}))
    params = codec.adaptation.params(codec.adaptation.initial_state())
    return codec.decode(codec.encode({"x": x}, KEY, params).message, KEY, params).tensors["x"]


ENCODED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "too long": (lambda x: (torch.cat((x, x)), {}), r"'encoded' with shape \(8,\) and dtype .*, but shape \(4,\)"),
    "another dtype": (lambda x: (x.half(), {}), "'encoded' .* torch.float16, but .* torch.float32"),
    "no tensor": (lambda x: (x.numpy().copy(), {}), "'encoded' as a ndarray, not as a tensor"),
    "no side values": (lambda x: x.clone(), "must return the encoded tensor, side values$"),
    "updates as well": (lambda x: (x.clone(), {}, {}), "must return the encoded tensor, side values$"),
}


@pytest.mark.parametrize("fault", ENCODED)
def test_encode(fault: str) -> None:
    @dataclass(frozen=True)
    class Wrong(Identity):
        def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
            return ENCODED[fault][0](x)

    with pytest.raises(TypeError, match=f"^Wrong.encode {'gives ' if 'must' not in ENCODED[fault][1] else ''}") as told:
        sends(Wrong(), wave(4))
    assert told.match(ENCODED[fault][1])


def test_encode_of_an_adaptive_stage_without_reports() -> None:
    @dataclass(frozen=True)
    class Wrong(PlusOneOverN):
        def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
            return super().encode(x, key, params)[:2]

    with pytest.raises(TypeError, match=r"Wrong.encode must return the encoded tensor, side values, state updates$"):
        sends(Wrong(), wave(4))


@pytest.mark.parametrize("value", [1.0, np.float32(1), None])
def test_a_side_value_that_is_no_tensor(value: object) -> None:
    @dataclass(frozen=True)
    class Wrong(Identity):
        def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
            return {"scale": TensorSpec((), torch.float32)}

        def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
            return x.clone(), {"scale": value}

    with pytest.raises(TypeError, match=f"Wrong.encode gives 'scale' as a {type(value).__name__}, not as a tensor"):
        sends(Wrong(), wave(4))


DECODED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "another shape": (lambda y: y.reshape(1, -1), r"with shape \(1, 4\) .* but shape \(4,\)"),
    "another dtype": (lambda y: y.double(), ".* torch.float64, but .* torch.float32"),
    "a tuple": (lambda y: (y, {}), "as a tuple, not as a tensor"),
}


@pytest.mark.parametrize("fault", DECODED)
def test_decode(fault: str) -> None:
    @dataclass(frozen=True)
    class Wrong(Identity):
        def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
            return DECODED[fault][0](y)

    with pytest.raises(TypeError, match=f"Wrong.decode gives 'decoded' {DECODED[fault][1]}"):
        sends(Wrong(), wave(4))


@pytest.mark.parametrize("value", [torch.tensor([1.0, 2.0]), np.zeros(2), {1, 2}, len])
def test_an_argument_that_no_schema_can_hold(value: object) -> None:
    @dataclass(frozen=True)
    class Table(Identity):
        values: object

    @dataclass(frozen=True)
    class Twice(Identity):
        inner: EncodingStage = field(default_factory=Identity)

    for part, name in ((Table(value), "Table.values"), (Twice(Table(value)), "Twice.inner: Table.values")):
        with pytest.raises(TypeError, match=f"^{name}: arguments must be plain values, stages or coders, not "):
            Encoder([part])
    assert Encoder([Table((1, 2.5, "a", None))]) == Encoder([Table((1, 2.5, "a", None))])


def test_values_that_a_stage_makes_infinite() -> None:
    @dataclass(frozen=True)
    class Squares(Identity):
        def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
            return x.square(), {}

    with pytest.raises(EncodeError, match="'x' cannot be encoded: Squares makes encoded NaN or infinite"):
        sends(Squares(), torch.tensor([1e30, 1.0]))


def test_an_aggregation_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"aggregation must be sum, min, max or stack, not 'mean'"):
        StateUpdate(TensorSpec((), torch.float32), "mean")


def test_a_stage_that_reports_and_needs_nothing() -> None:
    # the params are empty, so a broadcast attaches none
    @dataclass(frozen=True)
    class Reports(Adapts):
        def params(self, state: Tensors) -> Tensors:
            return {}

    check_stage(Reports(), lambda x: 0)
    tensors = {"x": wave(3)}
    codec = StateDictEncoder(rules={"x": Encoder([Reports()])}).bind(schema_of(tensors), reports=True)
    params = codec.adaptation.params(codec.adaptation.initial_state())
    assert params == {}
    back, reports = codec.decode(codec.encode(tensors, KEY, params).message, KEY, params)
    assert torch.equal(back["x"], wave(3))
    assert list(reports) == ["x/0/sum"]


# ------------------------------------------------------------------------------------ found by the battery

STASH: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Stashes(Identity):
    """Sends zeros, and decodes a tensor that `encode` left in the same process."""

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        STASH["x"] = x.clone()
        return torch.zeros_like(x), {}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return STASH["x"].clone() if STASH["x"].shape == spec.shape else y.clone()


@dataclass(frozen=True)
class Matrices(Identity):
    """Does not change vectors. Applies `encoded` to matrices, with a number that is uniform in [0, 1)."""

    unbiased: bool = field(default=True, init=False)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        if x.dim() == 2:
            return x + torch.from_numpy(key.bits(x.numel(), 16) / 2**16).to(x.dtype).reshape(x.shape), {}
        return x.clone(), {}


@dataclass(frozen=True)
class LargeSums(Identity):
    commutes_with_sum = True

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return (y if y.numel() < 1000 else y.clamp(-2, 2)).clone()


@dataclass(frozen=True)
class Looks(Identity):
    """Decodes symbols with a table. The last symbol is beyond the table; no sender makes this symbol."""

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        return TensorSpec.symbols(spec.shape, 4)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        return x.sign().add(1).to(torch.uint8), {}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0], dtype=spec.dtype)[y.long()]


FOUND: dict[type[EncodingStage], tuple[Callable, type[Exception], str]] = {
    Stashes: (testing.checks.check_same_key, AssertionError, "something reaches decode beside the message"),
    Matrices: (testing.checks.check_unbiased, AssertionError, "claims to be unbiased"),
    LargeSums: (testing.checks.check_commutes_with_sum, AssertionError, "does not commute"),
    Looks: (testing.checks.check_damage, IndexError, "out of bounds"),
}


@pytest.mark.parametrize("liar", FOUND, ids=lambda liar: liar.__name__)
def test_the_battery_finds(liar: type[EncodingStage]) -> None:
    check, error, text = FOUND[liar]
    assert check in testing.CHECKS
    with pytest.raises(error, match=text):
        check(Encoder([liar()], FixedWidth() if liar is Looks else Raw()), None)


def test_the_battery_says_what_it_tried(capsys: pytest.CaptureFixture[str]) -> None:
    check_stage(Adapts(), lambda x: 0)
    name, sent, refused, claims = capsys.readouterr().out.splitlines()
    assert "Adapts" in name and name.endswith(f"passes {len(testing.CHECKS)} checks.")
    assert f": {len(testing.inputs.floating_inputs())}, 20 arrays of hypothesis, and one of millions." in sent
    assert refused == "  Refused: none. Largest error: within the bound."
    assert claims == "  Claims: lossless, unbiased (10,000 draws), state."


def adaptive_fault(fault: str) -> AdaptiveEncodingStage:
    @dataclass(frozen=True)
    class Wrong(Adapts):
        def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
            return {"sum": StateUpdate(TensorSpec((), torch.float32), "stack" if fault == "stack" else "max")}

        def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
            if fault == "writes to the state":
                state["largest"].add_(1)
            if fault == "random":
                return {"largest": torch.rand(())}
            if fault == "other params":
                return {**super().update_state(state, aggregated), "more": torch.zeros(())}
            return super().update_state(state, aggregated)

        def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
            y, side, update = super().encode(x, key, params)
            if fault == "writes to params":
                params["largest"].add_(1)
            return (y + 0.1 * params["largest"] if fault == "later" else y), side, update

    return Wrong()


ADAPTIVE = {
    "stack": "params change",  # ignores that there is one row for each client
    "writes to the state": "update_state writes to the state",
    "random": "another state the second time",
    "other params": "params change",
    "writes to params": "writes to params",
    "later": "once it has learnt",
}


@pytest.mark.parametrize("fault", ADAPTIVE)
def test_the_battery_finds_in_an_adaptive_stage(fault: str) -> None:
    assert testing.checks.check_state in testing.CHECKS
    with pytest.raises(AssertionError, match=ADAPTIVE[fault]):
        testing.checks.check_state(Encoder([adaptive_fault(fault)]), None)


@pytest.mark.parametrize("method", ["initial_state", "params", "update_state"])
def test_a_state_or_params_that_are_no_tensors(method: str) -> None:
    wrong = type("Wrong", (Adapts,), {method: lambda self, *given: {"largest": 0.0}})()
    with pytest.raises(TypeError, match=f"Wrong.{method} gives 'largest' as a float, not as a tensor"):
        testing.checks.check_state(Encoder([wrong]), None)


def test_the_largest_error_is_asked_of_every_round() -> None:
    @dataclass(frozen=True)
    class Drifts(PlusOneOverN):
        def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
            return y - 1  # right in the first round only

    testing.checks.check_round_trip(Encoder([Drifts()]), None)
    with pytest.raises(AssertionError, match="once it has learnt"):
        testing.checks.check_state(Encoder([Drifts()]), lambda x: 1e-3)
    testing.checks.check_state(Encoder([PlusOneOverN()]), lambda x: 1e-3)
    testing.checks.check_state(Encoder([Statistics()]), lambda x: 0)
