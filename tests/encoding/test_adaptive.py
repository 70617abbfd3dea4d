"""Adaptive stages through StateDictEncoder: state on the server, params in the broadcast, reports in the upload."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from toys import PlusOneOverN, Statistics, Zlib

from fedq.encoding import (
    AdaptiveEncodingStage,
    Codec,
    Coder,
    EncodeError,
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    MessageError,
    Raw,
    StateDictEncoder,
    StateUpdate,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.adaptation import by_part
from fedq.encoding.message import OVERHEAD
from fedq.encoding.testing import raw_bytes, wave

KEY = Key(1)
TENSORS = {"a": wave(20), "b/c": wave(3, 4), "exact": wave(5)}
SCHEMA = schema_of(TENSORS)


PLUS_ONE = StateDictEncoder(rules={"exact": Encoder(), "*": Encoder([PlusOneOverN()])})


def reporting(*stages: EncodingStage | AdaptiveEncodingStage, name: str = "a", coder: Coder | None = None) -> Codec:
    """Returns a codec for SCHEMA that sends reports; `stages` encode the tensor `name`."""
    return StateDictEncoder(rules={name: Encoder(stages, coder or Raw())}).bind(SCHEMA, reports=True)


def statistics(scrambled: bool = False) -> Codec:
    return reporting(PlusOneOverN(), Statistics(scrambled))


def first_params(codec: Codec) -> dict[str, Tensor]:
    return codec.adaptation.params(codec.adaptation.initial_state())


def test_the_state_counts_and_the_clients_are_told() -> None:
    codec = PLUS_ONE.bind(SCHEMA)
    state = codec.adaptation.initial_state()
    assert state.keys() == {"a/0/n", "b/c/0/n"}
    for n in range(1, 5):
        params = codec.adaptation.params(state)
        assert {float(addend) for addend in params.values()} == {float(1 / torch.tensor(n).float())}
        message, reports = codec.encode(TENSORS, Key(0, n), params)
        assert reports == {}
        sent = torch.frombuffer(bytearray(message[44:124]), dtype=torch.float32)
        assert torch.equal(sent, TENSORS["a"] + 1 / torch.tensor(n).float())  # the message holds x + 1/n
        back, _ = codec.decode(message, Key(0, n), params)
        for name in TENSORS:
            torch.testing.assert_close(back[name], TENSORS[name])
        state = codec.adaptation.update_state(state, {})
    assert int(state["a/0/n"]) == 5


def test_params_travel_attached_and_are_counted() -> None:
    codec = PLUS_ONE.bind(SCHEMA)
    params = codec.adaptation.params(codec.adaptation.update_state(codec.adaptation.initial_state(), {}))
    assert list(params) == ["a/0/addend", "b/c/0/addend"]
    attaching = PLUS_ONE.bind(SCHEMA, attached=codec.adaptation.params_schema)
    without = codec.encode(TENSORS, KEY, params).message
    message = attaching.encode(TENSORS, KEY, params, attached=params).message
    assert len(message) - len(without) == 2 * 4
    back, front = attaching.decode(message, KEY)  # the message holds the params
    known, _ = codec.decode(without, KEY, params)
    assert {name: raw_bytes(value) for name, value in front.items()} == {
        name: raw_bytes(value) for name, value in params.items()
    }
    assert all(torch.equal(back[name], known[name]) for name in TENSORS)
    # params passed to decode replace the params in the message
    other, _ = attaching.decode(message, KEY, {name: torch.tensor(0.0) for name in params})
    torch.testing.assert_close(other["a"], TENSORS["a"] + 0.5)


def test_the_tensors_of_each_part() -> None:
    flat = {path: torch.tensor(1) for path in ("a/b/0/x", "a/b/12/y", "a/b/12/z", "c/1/x")}
    found = {path: list(own) for path, own in by_part(flat).items()}
    assert found == {"a/b/0": ["x"], "a/b/12": ["y", "z"], "c/1": ["x"]}


@pytest.mark.parametrize("scrambled", [False, True])
def test_reports_arrive(scrambled: bool) -> None:
    codec = statistics(scrambled)
    silent_codec = StateDictEncoder(rules={"a": codec.chains["a"].encoder}).bind(SCHEMA)
    params, spec = first_params(codec), codec.adaptation.report_schema
    assert list(spec) == [f"a/1/{name}" for name in ("count", "low", "high", "row", "total")]
    silent, updates = silent_codec.encode(TENSORS, KEY, params)
    message, reported = codec.encode(TENSORS, KEY, params)
    assert len(silent) == OVERHEAD + 4 * (20 + 12 + 5)
    assert len(message) - len(silent) == 8 + 4 + 4 + 8 + 4 * 20
    back, front = codec.decode(message, KEY, params)
    assert list(front) == list(spec)
    seen = TENSORS["a"] + 1
    assert int(front["a/1/count"]) == 20
    assert torch.equal(front["a/1/low"], seen.min())
    assert torch.equal(front["a/1/high"], seen.max())
    assert torch.equal(front["a/1/row"], seen[:2])
    assert torch.equal(front["a/1/total"], seen)
    torch.testing.assert_close(back["a"], TENSORS["a"])
    for given in (updates, reported):
        assert {path: raw_bytes(value) for path, value in given.items()} == {
            path: raw_bytes(value) for path, value in front.items()
        }
    with pytest.raises(MessageError, match="schema"):
        silent_codec.decode(message, KEY, params)


def test_update_specs_are_of_what_enters_the_chain() -> None:
    # Statistics reports a tensor of the shape of its spec, also after a stage that flattens the tensor
    @dataclass(frozen=True)
    class Flatten(EncodingStage):
        def encoded_spec(self, spec: TensorSpec, side: dict[str, Tensor]) -> TensorSpec:
            return TensorSpec((spec.numel,), spec.dtype)

        def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
            return x.reshape(-1).clone(), {}

        def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
            return y.reshape(spec.shape)

    @dataclass(frozen=True)
    class Unflatten(Statistics):
        def encode(
            self, x: Tensor, key: Key, params: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            y, side, updates = super().encode(x, key, params)
            return y, side, {**updates, "total": updates["total"].reshape(3, 4)}

    codec = reporting(Flatten(), Unflatten(), name="b/c")
    params = first_params(codec)
    back, front = codec.decode(codec.encode(TENSORS, KEY, params).message, KEY, params)
    assert torch.equal(back["b/c"], TENSORS["b/c"])
    assert torch.equal(front["b/c/1/total"], TENSORS["b/c"])


def test_an_adaptive_stage_may_follow_a_quantiser() -> None:
    # the symbols of a quantiser keep their number of levels on both sides, because the coder needs the number
    for coder in (FixedWidth(), Zlib()):
        codec = reporting(UniformQuantization(5), Statistics(), coder=coder)
        params = first_params(codec)
        back, front = codec.decode(codec.encode(TENSORS, KEY, params).message, KEY, params)
        assert float((back["a"] - TENSORS["a"]).abs().max()) < 2 / 31 + 1e-6
        assert (float(front["a/1/low"]), float(front["a/1/high"])) == (0, 31)


@pytest.mark.parametrize("offset", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("clients", [1, 2, 3, 5])
def test_updates_are_combined(offset: float, clients: int) -> None:
    codec = statistics()
    adaptation, params = codec.adaptation, first_params(codec)
    cohort = [TENSORS | {"a": wave(20).roll(i) * (i + 1) + offset} for i in range(clients)]
    seen = torch.stack([tensors["a"] + 1 for tensors in cohort])
    reports = []
    for i, tensors in enumerate(cohort):
        message = codec.encode(tensors, Key(0, 0, i), params).message
        reports.append(adaptation.as_cohort(codec.decode(message, Key(0, 0, i), params).attached))
    assert reports[0]["a/1/row"].shape == (1, 2)
    assert reports[0]["a/1/total"].shape == (20,)

    left = reports[0]
    for report in reports[1:]:
        left = adaptation.combine(left, report)
    right = reports[-1]
    for report in reports[-2::-1]:
        right = adaptation.combine(report, right)
    for combined in (left, right):  # any tree of sums gives the same result if it keeps the order
        assert list(combined) == list(adaptation.report_schema)
        assert int(combined["a/1/count"]) == 20 * clients
        assert combined["a/1/count"].dtype == torch.int64
        assert torch.equal(combined["a/1/low"], seen.min())
        assert torch.equal(combined["a/1/high"], seen.max())
        assert torch.equal(combined["a/1/row"], seen[:, :2])
        torch.testing.assert_close(combined["a/1/total"], seen.sum(0))

    state = adaptation.update_state(adaptation.initial_state(), left)
    assert torch.equal(state["a/1/high"], seen.max())
    assert torch.equal(state["a/1/rows"], seen[:, :2])
    assert int(state["a/0/n"]) == 2
    assert torch.equal(adaptation.params(state)["a/1/scale"], seen.max())


def test_combine_leaves_its_operands_alone() -> None:
    codec = statistics()
    one = codec.adaptation.as_cohort(codec.encode(TENSORS, KEY, first_params(codec)).reports)
    before = {path: value.clone() for path, value in one.items()}
    codec.adaptation.combine(one, one)
    assert all(torch.equal(one[path], before[path]) for path in before)


def test_an_update_that_is_not_finite_is_not_sent() -> None:
    @dataclass(frozen=True)
    class Overflows(Statistics):
        def encode(
            self, x: Tensor, key: Key, params: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            y, side, updates = super().encode(x, key, params)
            return y, side, {**updates, "high": updates["high"] * torch.inf}

    codec = reporting(Overflows())
    with pytest.raises(EncodeError, match="'a/0/high'"):
        codec.encode(TENSORS, KEY, first_params(codec))


def test_without_adaptive_stages_there_is_nothing_to_keep() -> None:
    encoder = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), threshold=10)
    codec = encoder.bind(SCHEMA)
    adaptation = codec.adaptation
    assert adaptation.initial_state() == {}
    assert adaptation.params({}) == {}
    assert adaptation.params_schema == adaptation.report_schema == {}
    assert adaptation.combine({}, {}) == {}
    assert adaptation.as_cohort({}) == {}
    assert adaptation.update_state({}, {}) == {}
    assert encoder.bind(SCHEMA, reports=True).encode(TENSORS, KEY) == codec.encode(TENSORS, KEY)


def test_a_stage_without_state_learns_nothing_and_may_report() -> None:
    @dataclass(frozen=True)
    class Stateless(Statistics):
        def initial_state(self, spec: TensorSpec) -> dict[str, Tensor]:
            return {}

        def params(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {}

        def update_state(self, state: dict[str, Tensor], aggregated: dict[str, Tensor]) -> dict[str, Tensor]:
            assert aggregated
            return state

    codec = reporting(Stateless())
    assert first_params(codec) == {}
    reports = codec.encode(TENSORS, KEY).reports
    assert torch.equal(reports["a/0/high"], TENSORS["a"].max())
    assert codec.adaptation.update_state({}, codec.adaptation.as_cohort(reports)) == {}


# ------------------------------------------------------------------------------------------ errors of stages


@dataclass(frozen=True)
class Author(EncodingStage):
    """Declares a float32 side value, and keeps shape and dtype. `fault` names the declaration that it breaks."""

    fault: str = ""

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec((), torch.float32)}

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        y, side = x.clone(), {"scale": torch.tensor(1.0)}
        if self.fault == "shape":
            y = y.reshape(-1)
        elif self.fault == "dtype":
            y = y.double()
        elif self.fault == "more":
            side["offset"] = torch.tensor(0.0)
        elif self.fault == "less":
            side = {}
        elif self.fault == "side dtype":
            side["scale"] = side["scale"].double()
        elif self.fault == "side shape":
            side["scale"] = side["scale"].reshape(1)
        return y, side

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y * side["scale"]


FAULTS = {
    "shape": "encoded",
    "dtype": "encoded",
    "more": "offset",
    "less": "scale",
    "side dtype": "scale",
    "side shape": "scale",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("position", [0, 1])
def test_authors_errors_name_the_stage(fault: str, position: int) -> None:
    stages = [Author(), Author()]
    stages[position] = Author(fault)
    with pytest.raises(TypeError, match=f"Author.encode gives .*{FAULTS[fault]}"):
        StateDictEncoder(Encoder(stages), 0).bind({"b/c": SCHEMA["b/c"]}).encode({"b/c": wave(3, 4)}, KEY)


def test_an_author_without_faults() -> None:
    codec = StateDictEncoder(Encoder([Author(), Author()]), 0).bind(schema_of({"x": wave(3, 4)}))
    message = codec.encode({"x": wave(3, 4)}, KEY).message
    assert len(message) == OVERHEAD + 2 * 4 + 48
    assert torch.equal(codec.decode(message, KEY).tensors["x"], wave(3, 4))


@pytest.mark.parametrize("fault", ["undeclared", "missing", "shape", "dtype"])
def test_authors_errors_in_updates_name_the_stage(fault: str) -> None:
    @dataclass(frozen=True)
    class Careless(Statistics):
        def encode(
            self, x: Tensor, key: Key, params: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            y, side, updates = super().encode(x, key, params)
            if fault == "undeclared":
                updates = {**updates, "mean": x.mean()}
            elif fault == "missing":
                updates = {name: value for name, value in updates.items() if name != "low"}
            elif fault == "shape":
                updates = {**updates, "low": updates["low"].reshape(1)}
            else:
                updates = {**updates, "low": updates["low"].double()}
            return y, side, updates

    codec = StateDictEncoder(rules={"a": Encoder([Careless()])}).bind(SCHEMA)
    with pytest.raises(TypeError, match="Careless.encode gives"):
        codec.encode(TENSORS, KEY, first_params(codec))


def test_a_stage_or_coder_must_be_a_dataclass() -> None:
    class Bare(EncodingStage):
        encode = Author.encode
        decode = Author.decode

    class BareCoder(Zlib.__base__):
        size = Zlib.size
        encode = Zlib.encode
        decode = Zlib.decode

    with pytest.raises(TypeError, match="Bare must be a dataclass"):
        Encoder([Bare()])
    with pytest.raises(TypeError, match="BareCoder must be a dataclass"):
        Encoder([], BareCoder())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool])
def test_sums_that_would_overflow_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="soon overflows"):
        StateUpdate(TensorSpec((), dtype), "sum")
    StateUpdate(TensorSpec((), dtype), "max")
    StateUpdate(TensorSpec((), torch.int64), "sum")


@pytest.mark.parametrize("what", ["state", "params", "reports"])
def test_names_with_a_slash_are_refused(what: str) -> None:
    def named(name: str, kind: str) -> str:
        return "a/b" if what == kind else name

    @dataclass(frozen=True)
    class Slashed(Statistics):
        def initial_state(self, spec: TensorSpec) -> dict[str, Tensor]:
            return {named("high", "state"): torch.tensor(1.0)}

        def params(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {named("scale", "params"): torch.tensor(1.0)}

        def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
            return {named("low", "reports"): StateUpdate(TensorSpec((), torch.float32), "min")}

    with pytest.raises(TypeError, match="must have no '/', unlike 'a/b'"):
        reporting(Slashed())
    # the name of a tensor may contain a slash
    assert list(first_params(reporting(Statistics(), name="b/c"))) == ["b/c/0/scale"]
