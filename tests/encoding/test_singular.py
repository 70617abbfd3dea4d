"""Compares SingularVectors with numpy's decomposition and with other numbers of vectors; tests hostile side values."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import (
    CABAC,
    Encoder,
    EncodingStage,
    Key,
    SingularVectors,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    schema_of,
)
from fedq.encoding.coders.coder import Buffer
from fedq.encoding.stages.singular import _leading
from fedq.encoding.testing import Bound, wave

KEY = Key(3, 1, 4)
GOLDEN = (232, "1673dfdd7c4663ad")


def bound(x: Tensor) -> float:
    """Returns the bound: rounding in the working dtype, in the tensor's dtype, and in sums of 2^30 steps."""
    if float(x.double().abs().max()) > 2**28 * 1e-3 / math.sqrt(x.numel()):
        return math.nan  # the stage may refuse the tensor
    return 1e-5 * float(x.double().abs().max()) + 1e-40 + 2 * torch.finfo(x.dtype).eps * float(x.double().abs().max())


STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (SingularVectors(1e-3), bound),
    (SingularVectors(1e-3, 2, 0.1), bound),
]


def low_rank(rows: int = 200, columns: int = 300, rank: int = 6, noise: float = 0.0) -> Tensor:
    """Returns a matrix of root mean square 1 plus noise. Each singular value is 1.5 times the next one.

    noise: The root mean square of the noise.
    """
    draw = np.random.default_rng(1)
    left, right = (np.linalg.qr(draw.normal(size=(n, rank)))[0] for n in (rows, columns))
    x = left * 1.5 ** -np.arange(rank) @ right.T
    x /= math.sqrt(float((x**2).mean()))
    return torch.from_numpy(x + noise * draw.normal(size=x.shape)).float()


def chain(step: float, rank: int = 32, rate_weight: float = 0.0) -> Encoder:
    after = StepQuantization(step, relative=False, rate_weight=rate_weight)
    return Encoder([SingularVectors(step, rank, rate_weight), after], CABAC())


def payload(encoder: Encoder, x: Tensor) -> list[Buffer]:
    return encoder.bind(TensorSpec.of(x)).encode(x, KEY, {})[0]


def sent(x: Tensor, encoder: Encoder) -> tuple[int, Tensor, int]:
    """Returns the bytes of a payload, the decoded tensor, and the number of vectors."""
    first, second = encoder.stages
    y, side = first.encode(x, KEY)
    symbols, _ = second.encode(y, KEY)
    back = first.decode(second.decode(symbols, {}, TensorSpec.of(y), KEY), side, TensorSpec.of(x), KEY)
    size = sum(len(part) for part in payload(encoder, x))
    return size, back, int(side["values"].count_nonzero())


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (60, 500), (400, 30), (140, 10, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_is_left_is_what_is_not_sent(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    columns = math.prod(shape[1:])
    x = low_rank(shape[0], columns, noise=0.1).reshape(shape).to(dtype)
    stage = SingularVectors(0.5)
    y, side = stage.encode(x, KEY)
    count = int(side["values"].count_nonzero())
    assert count == 6
    size, left, right = (side[name][:count].double() for name in ("values", "left", "right"))
    assert not any(side[name][count:].any() for name in side)
    sum_ = torch.einsum("kr,kc->rc", left * 0.5, right / size[:, None]).reshape(shape)
    error = float((x.double() - sum_ - y.double()).abs().max())
    assert error <= 2e-6 + 4 * torch.finfo(dtype).eps
    assert float((stage.decode(y, side, TensorSpec.of(x), KEY).double() - x.double()).abs().max()) <= 2 * error + 1e-5
    assert float(y.double().square().mean()) < 0.02 < float(x.double().square().mean())
    # the shorter vectors are fitted to the longer ones after rounding, so the rest is within half a step in their
    # directions
    matrix = y.double().reshape(shape[0], columns)
    along = (left / size[:, None]) @ matrix if shape[0] > columns else matrix @ (right / size[:, None]).t()
    assert float(along.abs().max()) <= 0.5 * 0.5 * 1.3 + 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["transposed", "channels last", "every second", "expanded"])
def test_the_layout_of_memory_does_not_matter(layout: str) -> None:
    x = {
        "transposed": low_rank(300, 200).t(),
        "channels last": low_rank(20, 360).reshape(20, 40, 3, 3).to(memory_format=torch.channels_last),
        "every second": low_rank(200, 300)[::2, ::2],
        "expanded": wave(300).expand(200, 300),
    }[layout]
    before = x.clone()
    (y, side), (other, own) = (SingularVectors(0.2).encode(given, KEY) for given in (x, x.contiguous()))
    assert int(side["values"].count_nonzero()) > 0
    assert torch.equal(x, before) and y.shape == x.shape
    torch.testing.assert_close(y, other, rtol=0, atol=0.3)
    assert all(float((side[name] - own[name]).abs().max()) <= 1 for name in side)


def test_the_vectors_are_those_of_the_decomposition() -> None:
    for noise in (0.0, 0.05):
        x = low_rank(300, 400, noise=noise)
        left, values, right = np.linalg.svd(x.double().numpy(), full_matrices=False)
        step = 0.01 * values[0] / 20
        _, side = SingularVectors(step, 6).encode(x, KEY)
        assert int(side["values"].count_nonzero()) == 6
        assert np.allclose(side["values"].numpy() * step, values[:6], rtol=0.01)
        for name, own in (("left", left[:, :6]), ("right", right[:6].T)):
            basis = np.linalg.qr(side[name].double().numpy().T)[0]
            cosines = np.linalg.svd(basis.T @ own)[1]
            assert cosines.min() > 0.995  # cosines of the angles between the two subspaces


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_the_number_of_vectors_is_the_cheapest(step: float, noise: float) -> None:
    x = low_rank(200, 300, noise=noise)
    size, back, count = sent(x, chain(step))
    cost = {}
    for rank in range(2, 12):  # if `rank` is smaller than the best number, all allowed vectors are sent
        stage = SingularVectors(step, rank)
        own_count = int(stage.encode(x, KEY)[1]["values"].count_nonzero())
        own_size, own_back, _ = sent(x, chain(step, rank))
        error = float((own_back - x).square().sum())
        cost[own_count] = min(
            cost.get(own_count, math.inf), own_size + 0.5 * x.numel() / 8 * math.log2(max(error, 1e-9))
        )
    error = float((back - x).square().sum())
    least = min(cost.values())
    assert size + 0.5 * x.numel() / 8 * math.log2(error) <= least + 0.03 * size + 40, (count, cost)


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_squared_error_is_that_of_the_step(step: float, noise: float) -> None:
    x = low_rank(noise=noise)
    _, back, count = sent(x, chain(step))
    assert count >= 1
    assert float((back - x).square().mean()) <= 1.05 * step**2 / 12
    _, moved, _ = sent(x, chain(step, rate_weight=0.1))
    assert float((moved - x).square().mean()) <= 2 * step**2 / 12


def test_fewer_bytes_than_without() -> None:
    x = low_rank(noise=0.1)
    alone = Encoder([StepQuantization(0.5, relative=False)], CABAC())
    plain = sum(len(part) for part in payload(alone, x))
    size, _, _ = sent(x, chain(0.5))
    assert size < 0.5 * plain


@pytest.mark.parametrize("shape", [(512, 3136), (64, 800), (20, 30)])
def test_overhead(shape: tuple[int, int]) -> None:
    """A matrix takes at most 16 bytes besides its four streams: their lengths, and the shift of the centroids."""
    encoder = Encoder([SingularVectors(0.5), StepQuantization(0.5, relative=False, centroids=True)], CABAC())
    sizes = [len(bytes(part)) for part in payload(encoder, low_rank(*shape, noise=0.2))]
    streams = [sizes[i] for i in (1, 3, 5, 8)]
    assert len(sizes) == 9
    assert sizes[6] == 4
    assert min(streams) > 4
    assert sum(sizes) - sum(streams) <= 16


def test_small_elements_with_something_in_common() -> None:
    """Every element is below a step and would be rounded to 0 alone, but common singular vectors are sent."""
    x = low_rank(300, 400)
    size, back, count = sent(x, chain(1.01 * float(x.abs().max())))
    assert count >= 2
    assert size < 1000
    assert float((back - x).square().sum()) < 0.3 * float(x.square().sum())
    assert sent(x, chain(1.01 * float(x.norm())))[2] == 0


def test_matrices_that_are_hard() -> None:
    equal = torch.from_numpy(np.linalg.qr(np.random.default_rng(2).normal(size=(200, 200)))[0]).float() * 50
    for x in (
        torch.full((200, 300), 0.1),
        equal,
        torch.eye(300) * 30,
        torch.cat([low_rank(), low_rank()]),
        low_rank(rank=1),
        torch.zeros(200, 300),
        low_rank() * 1e-20,
        low_rank() * 1e15,
        low_rank().double() * 1e-290,
        low_rank().double() * 1e140,
        torch.cat([low_rank(150, 300) * 1e-6, low_rank(150, 300) * 1e3]),
    ):
        for part in (0.01, 0.3, 2.0):
            stage = SingularVectors(max(1e-37, part * float(x.double().square().mean().sqrt())), 32, 0.1)
            y, side = stage.encode(x, KEY)
            assert stage.encoded_spec(TensorSpec.of(x), side) == TensorSpec.of(y)
            back = stage.decode(y, side, TensorSpec.of(x), KEY)
            assert float((back - x).abs().max()) <= 1e-5 * float(x.abs().max())


def test_matrices_of_few_values_converge() -> None:
    """Dropped units, dead units and equal singular values made LAPACK's ssyevd fail on some machines."""
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows = int(torch.randint(40, 128, (), generator=random))
        live = torch.randperm(rows, generator=random)[: rows // 2]
        x = torch.zeros(rows, rows + 50)
        chosen = torch.rand(len(live), rows + 50, generator=random) < 0.02
        x[live] = torch.randint(-2, 3, chosen.shape, generator=random) * 0.3 * chosen
        values, vectors = _leading(x, 32, KEY)
        exact = torch.linalg.svdvals(x.double())[:32]
        torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-4)
        some = exact > 1e-3
        torch.testing.assert_close((vectors @ x.t()).norm(dim=1)[some], values[some], rtol=1e-4, atol=1e-4)


def test_what_is_too_large_is_refused() -> None:
    for x, step in ((low_rank() * 1e18, 1e17), (low_rank().double() * 1e155, 1e154), (low_rank(), 1e-9)):
        with pytest.raises(ValueError, match="too large"):
            SingularVectors(step).encode(x, KEY)
    with pytest.raises(ValueError, match="floating"):
        SingularVectors(1.0).side_spec(TensorSpec((5, 5), torch.int32))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (1, 50), (50, 1), (3, 0), (0, 3), (3, 0, 2)])
def test_what_is_no_matrix_has_no_side_values(shape: tuple[int, ...]) -> None:
    x, stage = wave(*shape) * 100, SingularVectors(0.1)
    assert stage.side_spec(TensorSpec.of(x)) == {}
    y, side = stage.encode(x, KEY)
    assert torch.equal(stage.decode(y, side, TensorSpec.of(x), KEY), x)


@pytest.mark.parametrize(
    "values", [[0, 5], [-5, 5], [5, -5], [-(2**31), 1], [0, -1], [5, 0]], ids=lambda values: f"{values}"
)
def test_side_values_that_are_never_sent_are_refused(values: list[int]) -> None:
    spec = TensorSpec((2, 3), torch.float32)
    side = {
        "values": torch.tensor(values).int(),
        "left": torch.ones(2, 2, dtype=torch.int32),
        "right": torch.ones(2, 3, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match="singular value"):
        SingularVectors(1.0, 2).encoded_spec(spec, side)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_side_values_decode_to_finite_tensors(dtype: torch.dtype) -> None:
    spec, large = TensorSpec((40, 50), dtype), 2**31 - 1
    for step in (1e-37, 1.0, 1e37):
        stage = SingularVectors(step)
        for size, number in ((1, large), (large, large), (large, 1), (1, -(2**31))):
            side = {
                name: torch.full(own.shape, number, dtype=torch.int32) for name, own in stage.side_spec(spec).items()
            }
            side["values"].fill_(size)
            side["left"][::2] *= -1
            assert stage.encoded_spec(spec, side) == spec
            for y in (
                torch.zeros(spec.shape, dtype=dtype),
                torch.full(spec.shape, torch.finfo(dtype).max, dtype=dtype),
            ):
                back = stage.decode(y, side, spec, KEY)
                assert back.dtype == dtype and bool(back.isfinite().all())


@pytest.mark.parametrize(
    "given",
    [{"step": 0}, {"step": math.inf}, {"rank": 0}, {"rank": 257}, {"rate_weight": -1}, {"rate_weight": math.nan}],
)
def test_arguments_are_refused(given: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        SingularVectors(**{"step": 1.0, **given})


def test_the_format_is_frozen() -> None:
    # the matrix has rank 1, and no value is near half a step, so the last bits of a processor do not matter
    x = torch.outer((torch.arange(140) % 7 - 3).float(), (torch.arange(150) % 11 - 4).float())
    left, values, right = np.linalg.svd(x.double().numpy(), full_matrices=False)
    for vector in (left[:, 0], right[0]):
        assert np.abs(vector * values[0] / 6.0 % 1 - 0.5).min() > 0.01
    sent = b"".join(bytes(part) for part in payload(chain(6.0), x))
    assert (len(sent), hashlib.blake2b(sent, digest_size=8).hexdigest()) == GOLDEN


@pytest.mark.parametrize("step", [2e4, 5e4, 1e5])
def test_what_is_left_of_the_largest_float16_is_none(step: float) -> None:
    """One element of the rest would overflow float16, so no vector is sent."""
    x = torch.full((200, 300), 65504.0).half()
    x[3, 4] = -65504
    encoder = Encoder([SingularVectors(step), StepQuantization(step, relative=False)], CABAC())
    codec = StateDictEncoder(rules={"x": encoder}).bind(schema_of({"x": x}))
    back, _ = codec.decode(codec.encode({"x": x}, KEY).message, KEY)
    assert float((back["x"].float() - x.float()).abs().max()) <= 0.5 * step


@pytest.mark.parametrize("weight", [3.0, 10.0, 50.0])
def test_all_is_0_at_once_for_no_weight_where_it_would_not_be(weight: float) -> None:
    """At a high rate_weight, 2 can pay before 1 does. A larger element changes only its row and column."""
    for size in torch.linspace(0.5, 1 + weight, 40).tolist():
        x = torch.full((40, 50), size)
        stage = StepQuantization(1.0, relative=False, rate_weight=weight)
        alone = stage.encode(x, KEY)[0]
        x[0, 0] = 2 + weight
        assert torch.equal(alone[1:, 1:], stage.encode(x, KEY)[0][1:, 1:]), size


@pytest.mark.parametrize(("value", "symbol"), [(0.54, 0), (0.57, 0), (0.62, 1)])
def test_all_is_0_at_once_only_where_it_would_be_anyway(value, symbol):
    """If all elements are equal, the mean magnitude is 1, and 1 costs two bits more than 0.

    So 1 pays from 0.6 steps on.
    """
    x = torch.full((8, 8), value)
    symbols, side = StepQuantization(1.0, relative=False, rate_weight=0.1, centroids=True).encode(x, Key(0))
    assert (symbols == symbol).all()
    assert float(side["shift"]) == pytest.approx(symbol * (value - 1), abs=1e-6)
    plain, _ = StepQuantization(1.0, relative=False, dead_zone=0.6).encode(x, Key(0))
    assert (plain == symbol).all()


def test_one_vector_can_be_all_that_is_sent() -> None:
    size, back, count = sent(low_rank(200, 300, rank=1), chain(0.05, rank=1))
    assert count == 1
    assert size < 1000  # the message has 500 numbers of about 11 bits, not 60,000
    assert float((back - low_rank(200, 300, rank=1)).abs().max()) < 0.2


def test_the_unit_does_not_matter_beyond_float32() -> None:
    """The sum of squares overflows float32, but not float64, the dtype of the tensor."""
    x = low_rank(noise=1.0).double()
    counts = [sent(x * unit, chain(8.0 * unit))[2] for unit in (1.0, 1e25)]
    assert counts[0] == counts[1]
    assert sent(1e25 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).double(), chain(3e25))[2] == 0
