"""Adaptive stages through StateDictEncoder: state on the server, params in the broadcast, reports in the upload."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from toys import PlusOneOverN, Statistics, Zlib

from fedq.encoding import (
    EncodeError,
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    MessageError,
    StateDictEncoder,
    StateUpdate,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.message import OVERHEAD
from fedq.encoding.state_dict import flatten, unflatten
from fedq.encoding.testing import raw_bytes, wave

KEY = Key(1)
TENSORS = {"a": wave(20), "b/c": wave(3, 4), "exact": wave(5)}
SCHEMA = schema_of(TENSORS)


def plus_one() -> StateDictEncoder:
    return StateDictEncoder(rules={"exact": Encoder(), "*": Encoder([PlusOneOverN()])})


def statistics(scrambled: bool = False) -> StateDictEncoder:
    return StateDictEncoder(rules={"a": Encoder([PlusOneOverN(), Statistics(scrambled)])})


def test_the_state_counts_and_the_clients_are_told() -> None:
    encoder = plus_one()
    state = encoder.initial_state(SCHEMA)
    assert state.keys() == {"a", "b/c"}
    for n in range(1, 5):
        params = encoder.params(SCHEMA, state)
        assert {float(by_stage[0]["addend"]) for by_stage in params.values()} == {float(1 / torch.tensor(n).float())}
        message, updates = encoder.encode(TENSORS, Key(0, n), params)
        assert flatten(updates) == {}
        sent = torch.frombuffer(bytearray(message[44:124]), dtype=torch.float32)
        assert torch.equal(sent, TENSORS["a"] + 1 / torch.tensor(n).float())  # it is x + 1/n that travels
        back, _ = encoder.decode(message, Key(0, n), SCHEMA, params)
        for name in TENSORS:
            torch.testing.assert_close(back[name], TENSORS[name])
        state = encoder.update_state(SCHEMA, state, {})
    assert int(state["a"][0]["n"]) == 5


def test_params_travel_attached_and_are_counted() -> None:
    encoder = plus_one()
    state = encoder.update_state(SCHEMA, encoder.initial_state(SCHEMA), {})
    params = encoder.params(SCHEMA, state)
    attached = flatten(params)
    assert list(attached) == ["a/0/addend", "b/c/0/addend"]
    without, _ = encoder.encode(TENSORS, KEY, params)
    message, _ = encoder.encode(TENSORS, KEY, params, attached)
    assert len(message) - len(without) == 2 * 4
    back, front = encoder.decode(message, KEY, SCHEMA, attached=schema_of(attached))  # nothing but the message
    known, _ = encoder.decode(without, KEY, SCHEMA, params)
    assert {name: raw_bytes(value) for name, value in front.items()} == {
        name: raw_bytes(value) for name, value in attached.items()
    }
    assert all(torch.equal(back[name], known[name]) for name in TENSORS)
    # those that are known go before those that travel
    wrong = {name: {0: {"addend": torch.tensor(0.0)}} for name in params}
    other, _ = encoder.decode(message, KEY, SCHEMA, wrong, schema_of(attached))
    torch.testing.assert_close(other["a"], TENSORS["a"] + 0.5)


def test_flatten_and_unflatten() -> None:
    nested = {"a/b": {0: {"x": torch.tensor(1)}, 12: {"y": torch.tensor(2), "z": torch.tensor(3)}}, "c": {1: {}}}
    flat = flatten(nested)
    assert list(flat) == ["a/b/0/x", "a/b/12/y", "a/b/12/z"]
    assert unflatten(flat) == {"a/b": nested["a/b"]}


@pytest.mark.parametrize("scrambled", [False, True])
def test_reports_arrive(scrambled: bool) -> None:
    encoder = statistics(scrambled)
    params = encoder.params(SCHEMA, encoder.initial_state(SCHEMA))
    spec = encoder.update_spec(SCHEMA)
    assert list(spec) == [f"a/1/{name}" for name in ("count", "low", "high", "row", "total")]
    silent, updates = encoder.encode(TENSORS, KEY, params)
    message, reported = encoder.encode(TENSORS, KEY, params, report=True)
    assert len(silent) == OVERHEAD + 4 * (20 + 12 + 5)
    assert len(message) - len(silent) == 8 + 4 + 4 + 8 + 4 * 20
    back, front = encoder.decode(message, KEY, SCHEMA, params, spec)
    assert list(front) == list(spec)
    seen = TENSORS["a"] + 1
    assert int(front["a/1/count"]) == 20
    assert torch.equal(front["a/1/low"], seen.min())
    assert torch.equal(front["a/1/high"], seen.max())
    assert torch.equal(front["a/1/row"], seen[:2])
    assert torch.equal(front["a/1/total"], seen)
    torch.testing.assert_close(back["a"], TENSORS["a"])
    for given in (updates, reported):
        assert {path: raw_bytes(value) for path, value in flatten(given).items()} == {
            path: raw_bytes(value) for path, value in front.items()
        }
    with pytest.raises(MessageError, match="schema"):
        encoder.decode(message, KEY, SCHEMA, params)


def test_update_specs_are_of_what_enters_the_chain() -> None:
    # Statistics reports a tensor of its spec's shape; behind a stage that flattens it, too
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

    encoder = StateDictEncoder(rules={"b/c": Encoder([Flatten(), Unflatten()])})
    params = encoder.params(SCHEMA, encoder.initial_state(SCHEMA))
    message, _ = encoder.encode(TENSORS, KEY, params, report=True)
    back, front = encoder.decode(message, KEY, SCHEMA, params, encoder.update_spec(SCHEMA))
    assert torch.equal(back["b/c"], TENSORS["b/c"])
    assert torch.equal(front["b/c/1/total"], TENSORS["b/c"])


def test_an_adaptive_stage_may_follow_a_quantiser() -> None:
    # what comes out of a quantiser keeps its levels on both sides, so that the coder knows them
    for coder in (FixedWidth(), Zlib()):
        encoder = StateDictEncoder(rules={"a": Encoder([UniformQuantization(5), Statistics()], coder)})
        params = encoder.params(SCHEMA, encoder.initial_state(SCHEMA))
        back, front = encoder.decode(
            encoder.encode(TENSORS, KEY, params, report=True)[0], KEY, SCHEMA, params, encoder.update_spec(SCHEMA)
        )
        assert float((back["a"] - TENSORS["a"]).abs().max()) < 2 / 31 + 1e-6
        assert (float(front["a/1/low"]), float(front["a/1/high"])) == (0, 31)


@pytest.mark.parametrize("offset", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("clients", [1, 2, 3, 5])
def test_updates_are_combined(offset: float, clients: int) -> None:
    encoder = statistics()
    params = encoder.params(SCHEMA, encoder.initial_state(SCHEMA))
    cohort = [TENSORS | {"a": wave(20).roll(i) * (i + 1) + offset} for i in range(clients)]
    seen = torch.stack([tensors["a"] + 1 for tensors in cohort])
    reports = []
    for i, tensors in enumerate(cohort):
        message, _ = encoder.encode(tensors, Key(0, 0, i), params, report=True)
        _, front = encoder.decode(message, Key(0, 0, i), SCHEMA, params, encoder.update_spec(SCHEMA))
        reports.append(encoder.report(SCHEMA, front))
    assert reports[0]["a/1/row"].shape == (1, 2)
    assert reports[0]["a/1/total"].shape == (20,)

    left = reports[0]
    for report in reports[1:]:
        left = encoder.combine(SCHEMA, left, report)
    right = reports[-1]
    for report in reports[-2::-1]:
        right = encoder.combine(SCHEMA, report, right)
    for combined in (left, right):  # in whatever tree, so long as the order is kept
        assert list(combined) == list(encoder.update_spec(SCHEMA))
        assert int(combined["a/1/count"]) == 20 * clients
        assert combined["a/1/count"].dtype == torch.int64
        assert torch.equal(combined["a/1/low"], seen.min())
        assert torch.equal(combined["a/1/high"], seen.max())
        assert torch.equal(combined["a/1/row"], seen[:, :2])
        torch.testing.assert_close(combined["a/1/total"], seen.sum(0))

    state = encoder.update_state(SCHEMA, encoder.initial_state(SCHEMA), left)
    assert torch.equal(state["a"][1]["high"], seen.max())
    assert torch.equal(state["a"][1]["rows"], seen[:, :2])
    assert int(state["a"][0]["n"]) == 2
    assert torch.equal(encoder.params(SCHEMA, state)["a"][1]["scale"], seen.max())


def test_combine_leaves_its_operands_alone() -> None:
    encoder = statistics()
    params = encoder.params(SCHEMA, encoder.initial_state(SCHEMA))
    _, updates = encoder.encode(TENSORS, KEY, params)
    one = encoder.report(SCHEMA, flatten(updates))
    before = {path: value.clone() for path, value in one.items()}
    encoder.combine(SCHEMA, one, one)
    assert all(torch.equal(one[path], before[path]) for path in before)


def test_an_update_that_is_not_finite_is_not_sent() -> None:
    @dataclass(frozen=True)
    class Overflows(Statistics):
        def encode(
            self, x: Tensor, key: Key, params: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            y, side, updates = super().encode(x, key, params)
            return y, side, {**updates, "high": updates["high"] * torch.inf}

    encoder = StateDictEncoder(rules={"a": Encoder([Overflows()])})
    params = encoder.params(SCHEMA, encoder.initial_state(SCHEMA))
    with pytest.raises(EncodeError, match="'a/0/high'"):
        encoder.encode(TENSORS, KEY, params, report=True)


def test_without_adaptive_stages_there_is_nothing_to_keep() -> None:
    encoder = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), threshold=10)
    assert encoder.initial_state(SCHEMA) == {}
    assert encoder.params(SCHEMA, {}) == {}
    assert encoder.update_spec(SCHEMA) == {}
    assert encoder.combine(SCHEMA, {}, {}) == {}
    assert encoder.report(SCHEMA, {}) == {}
    assert encoder.update_state(SCHEMA, {}, {}) == {}
    plain, _ = encoder.encode(TENSORS, KEY)
    assert encoder.encode(TENSORS, KEY, report=True)[0] == plain


# ------------------------------------------------------------------------------------------- authors' errors


@dataclass(frozen=True)
class Author(EncodingStage):
    """Declares a float32 side value, and keeps shape and dtype; `fault` is what it does instead."""

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
        StateDictEncoder(Encoder(stages), 0).encode({"b/c": wave(3, 4)}, KEY)


def test_an_author_without_faults() -> None:
    encoder = StateDictEncoder(Encoder([Author(), Author()]), 0)
    message, _ = encoder.encode({"x": wave(3, 4)}, KEY)
    assert len(message) == OVERHEAD + 2 * 4 + 48
    assert torch.equal(encoder.decode(message, KEY, schema_of({"x": wave(3, 4)}))[0]["x"], wave(3, 4))


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

    encoder = StateDictEncoder(rules={"a": Encoder([Careless()])})
    params = encoder.params(SCHEMA, encoder.initial_state(SCHEMA))
    with pytest.raises(TypeError, match="Careless.encode gives"):
        encoder.encode(TENSORS, KEY, params)


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


def test_names_with_a_slash_are_refused() -> None:
    with pytest.raises(TypeError, match="must have no '/', not 'a/b'"):
        flatten({"layer/weight": {0: {"a/b": torch.zeros(1)}}})
    tensors = {"layer/weight": {0: {"a": torch.zeros(1)}, 1: {"b": torch.ones(2)}}}
    assert unflatten(flatten(tensors)) == tensors
