"""Compares UniformQuantization and StepQuantization with numpy, statistics and rate-distortion theory."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor

from fedq.encoding import (
    ANS,
    CABAC,
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    StepQuantization,
    TensorSpec,
    UniformQuantization,
    testing,
)
from fedq.encoding.coders import Coder
from fedq.encoding.stages import step_loops, uniform
from fedq.encoding.stages.step import rate_distortion
from fedq.encoding.testing import Bound, wave

KEY = Key(8, 1, 2)
Uniform = UniformQuantization


def groups_of(stage: Uniform, x: Tensor) -> list[np.ndarray]:
    """Returns for each range the places of its elements, in row-major order."""
    places = np.arange(x.numel())
    if stage.block is not None:
        return [places[start : start + stage.block] for start in range(0, len(places), stage.block)]
    if stage.axis is not None and x.dim() > 1:
        return [p.reshape(-1) for p in np.moveaxis(places.reshape(x.shape), stage.axis, 0)]
    return [places]


def range_of(stage: Uniform, values: np.ndarray) -> tuple[float, float]:
    """Returns the lower and upper end of a range, from the documentation."""
    if stage.limit is not None:
        return -stage.limit, stage.limit
    if stage.quantile is None:
        return float(values.min()), float(values.max())
    magnitudes = np.sort(np.abs(values))
    high = float(magnitudes[math.ceil(stage.quantile * len(values)) - 1]) or float(magnitudes[-1])
    return -high, high


def bound_of(stage: Uniform) -> Bound:
    """Returns the bound: a step or half a step, the clipped part, and rounding of the dtypes."""

    def bound(x: Tensor) -> float:
        flat, info, largest = x.double().reshape(-1).numpy(), torch.finfo(x.dtype), 0.0
        own = 2**-52 if x.dtype == torch.float64 else 2**-23
        for places in groups_of(stage, x):
            if len(places):
                low, high = range_of(stage, flat[places])
                top = 2**stage.bits - (1 if stage.quantile is None and stage.limit is None else 2)
                step, peak = high / top - low / top, float(np.abs(flat[places]).max())
                clipped = max(0.0, peak - high) if stage.quantile or stage.limit else 0.0
                noise = 6 * max(own, info.eps) * max(peak, abs(low), high) + info.smallest_normal * info.eps
                rounding = 1 if stage.rounding == "stochastic" else 0.5
                # if step · 2^bits is a denormal, the step is a denormal too
                largest = max(largest, step * rounding + clipped + noise + 2**stage.bits * 5e-324)
        return largest

    return bound


ROUNDINGS = ("stochastic", "nearest", "dithered")
RANGES: list[dict[str, float]] = [{}, {"quantile": 1.0}, {"quantile": 0.9}]
GROUPS: list[dict[str, int]] = [
    {},
    {"axis": 0},
    {"axis": 1},
    {"axis": -1},
    {"block": 64},
    {"block": 7},
    {"block": 10**9},
]
UNIFORM = [
    Uniform(4, "dithered"),
    Uniform(13, "dithered"),
    Uniform(8, quantile=1.0),
    Uniform(2, "nearest", quantile=1.0),
    Uniform(14, "dithered", quantile=1.0),
    Uniform(8, quantile=0.9),
    Uniform(8, limit=1.0),
    Uniform(6, "dithered", limit=1e5),
    Uniform(8, axis=0),
    Uniform(8, "dithered", axis=1),
    Uniform(5, "nearest", axis=-1),
    Uniform(8, block=64),
    Uniform(3, "nearest", block=7),
    Uniform(8, "dithered", block=64, quantile=1.0),
    Uniform(4, block=64, quantile=0.95),
]
STEPS = [
    StepQuantization(0.5),
    StepQuantization(1.5, dead_zone=0.7, centroids=True),
    StepQuantization(0.3, rounding="stochastic"),
    StepQuantization(0.3, rounding="dithered"),
    StepQuantization(0.8, rate_weight=0.1155, centroids=True),
]
STAGES: list[tuple[EncodingStage, Bound | None]] = [(stage, bound_of(stage)) for stage in UNIFORM]
STAGES += [(stage, None) for stage in STEPS]


def send(stage: Uniform | StepQuantization, x: Tensor, key: Key = KEY) -> Tensor:
    y, side = stage.encode(x, key)
    spec = TensorSpec.of(x)
    assert TensorSpec.of(y) == dataclasses.replace(stage.encoded_spec(spec, side), levels=None)
    return stage.decode(y, side, spec, key)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(Key(seed).generator().normal(size=shape)).float()


@pytest.mark.parametrize(("group", "where"), list(itertools.product(GROUPS, RANGES)), ids=str)
def test_agrees_with_numpy(group: dict[str, int], where: dict[str, float]) -> None:
    for bits, shape in ((2, (301,)), (5, (6, 35)), (8, (3, 4, 5, 2)), (13, (1, 9)), (3, (5, 1))):
        stage = Uniform(bits, "nearest", **group, **where)
        x = normal(*shape, seed=bits) * torch.linspace(1, 3, shape[-1]) + 0.1
        flat, expected = x.double().reshape(-1).numpy(), np.empty(x.numel())
        groups = groups_of(stage, x)
        for places in groups:
            low, high = range_of(stage, flat[places])
            step = (high - low) / (2**bits - (2 if where else 1)) or 1.0
            expected[places] = low + np.floor((flat[places].clip(low, high) - low) / step + 0.5) * step
        np.testing.assert_allclose(send(stage, x).double().reshape(-1), expected, rtol=0, atol=3e-6)
        payload, _ = Encoder([stage], FixedWidth()).bind(TensorSpec.of(x)).encode(x, KEY, {})
        assert len(b"".join(payload)) == len(groups) * (4 if where else 8) + math.ceil(x.numel() * bits / 8)


@pytest.mark.parametrize(("rounding", "group"), list(itertools.product(ROUNDINGS, GROUPS)), ids=str)
def test_pieces_do_not_change_the_draws(rounding: str, group: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    stage, x = Uniform(8, rounding, **group), normal(9, 101)
    y, side = stage.encode(x, KEY)
    whole = stage.decode(y, side, TensorSpec.of(x), KEY)
    monkeypatch.setattr(uniform, "_CHUNK", 28)
    assert torch.equal(stage.encode(x, KEY)[0], y)
    assert torch.equal(stage.decode(y, side, TensorSpec.of(x), KEY), whole)


def test_draws_are_16_bits_of_the_key() -> None:
    x = normal(10_001).double()
    y, side = Uniform(8).encode(x, KEY)
    low, high = float(side["minimum"]), float(side["maximum"])
    dither = (KEY.bits(len(x), 16).view(np.int16) + 0.5) / 2**16
    symbols = np.floor((x.numpy() - low) / ((high - low) / 255) + dither + 0.5)
    assert (symbols != y.numpy()).sum() <= 1
    back = Uniform(8, "dithered").decode(y, side, TensorSpec.of(x), KEY)
    assert np.abs(back.numpy() - (low + (y.numpy() - dither) * (high - low) / 255)).max() < 1e-12


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_dithered_error_is_uniform_and_independent(bits: int) -> None:
    # many elements at both ends of the range would show clipping
    x = torch.cat([normal(60_000).clamp(-2, 2), torch.full((20_000,), 0.123), torch.full((20_000,), 2.0)])
    step = (x.max() - x.min()).item() / (2**bits - 1)
    error = ((send(Uniform(bits, "dithered"), x) - x).double() / step).numpy()
    assert np.abs(error).max() <= 0.5 + 1e-4
    for part in (error, error[x.numpy() == 2], error[x.numpy() == np.float32(0.123)], error[x.numpy() == -2]):
        assert stats.kstest(part, stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
    for of_x in (x, x.abs(), x.square()):
        assert abs(np.corrcoef(error, of_x)[0, 1]) < 4 / math.sqrt(len(x))
    # stochastic rounding has the error f (1 − f) at the fraction f, and no error at the ends
    at = x[60_000:80_000]
    fraction = float((at[0] - x.min()) / step % 1)
    own = ((send(Uniform(bits), x) - x).double() / step).numpy()
    assert own[60_000:80_000].var() == pytest.approx(fraction * (1 - fraction), rel=0.05)
    assert np.abs(own[80_000:]).max() < 1e-4


@pytest.mark.parametrize("bits", range(2, 17))
def test_zero_is_exact_in_a_symmetric_range(bits: int) -> None:
    x = normal(1000, seed=bits)
    x[::3] = 0
    for stage in (Uniform(bits, "nearest", quantile=1.0), Uniform(bits, "nearest", limit=0.37)):
        back = send(stage, x)
        assert bool((back[::3] == 0).all())
        y, side = stage.encode(x, KEY)
        assert stage.encoded_spec(TensorSpec.of(x), side).levels == 2**bits - 1
        ends = side["maximum"] if side else torch.tensor(0.37)
        torch.testing.assert_close(back.abs().max(), ends, rtol=3e-7, atol=0)
        assert torch.equal(
            send(stage, -x)[y != stage.encode(x + 1e-6, KEY)[0]], -back[y != stage.encode(x + 1e-6, KEY)[0]]
        )


def test_quantile_of_sparse_tensors_and_blocks() -> None:
    x = torch.zeros(1000)
    x[::100] = torch.arange(10.0) + 1
    for quantile, expected in ((0.99, 0.0), (0.995, 5.0), (1.0, 10.0)):
        _, side = Uniform(8, quantile=quantile).encode(x, KEY)
        assert float(side["maximum"]) == (expected or 10.0)  # with a range of 0, all elements would be lost
    _, side = Uniform(8, quantile=0.5, block=4).encode(torch.tensor([1.0, -2, 3, -4, 0, 0, 0, 7, 5]), KEY)
    assert side["maximum"].tolist() == [2, 7, 5]


def test_limit() -> None:
    stage, x = Uniform(4, "nearest", limit=0.5), torch.tensor([-9.0, -0.5, 0.0, 0.1, 0.49, 0.51, 3e38])
    back, step = send(stage, x), 0.5 / 7
    torch.testing.assert_close(back[[0, 1, 2, 5, 6]], torch.tensor([-0.5, -0.5, 0, 0.5, 0.5]))
    assert float((back - x)[3:5].abs().max()) <= step / 2
    payload, _ = Encoder([stage], FixedWidth()).bind(TensorSpec.of(x)).encode(x, KEY, {})
    assert len(b"".join(payload)) == 4
    for rounding in ROUNDINGS:  # a limit above the dtype's largest value never gives infinity
        x = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
        assert bool(send(Uniform(2, rounding, limit=1e5), x).isfinite().all())


def test_channels() -> None:
    x = normal(50)
    for axis in (0, 1, 5, -1):  # a bias has one axis, so it has one range
        assert torch.equal(send(Uniform(4, "nearest", axis=axis), x), send(Uniform(4, "nearest"), x))
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"no axis {axis} in a tensor of 2 axes"):
            Uniform(8, axis=axis).side_spec(TensorSpec((3, 4), torch.float32))
    assert float((send(Uniform(1, axis=0), wave(20, 2)) - wave(20, 2)).abs().max()) < 1e-6  # each row has two values


def test_flags() -> None:
    for rounding in ROUNDINGS:
        for given, clips in (
            ({}, False),
            ({"quantile": 1.0}, False),
            ({"quantile": 0.999}, True),
            ({"limit": 9.0}, True),
        ):
            assert Uniform(8, rounding, **given).unbiased == (rounding != "nearest" and not clips)
        assert StepQuantization(1.0, rounding=rounding).unbiased == (rounding != "nearest")
        absolute = StepQuantization(1.0, False, rounding)
        assert absolute.commutes_with_sum == (rounding != "dithered")
    assert not StepQuantization(1.0).commutes_with_sum
    assert not StepQuantization(1.0, False, centroids=True).commutes_with_sum


@pytest.mark.parametrize(
    "given",
    [
        {"bits": 1, "quantile": 1.0},
        {"bits": 1, "limit": 1.0},
        {"quantile": 0.0},
        {"quantile": 1.01},
        {"limit": 0.0},
        {"limit": math.inf},
        {"limit": math.nan},
        {"block": 0},
        {"axis": 0, "block": 4},
        {"limit": 1.0, "block": 4},
        {"limit": 1.0, "quantile": 1.0},
        {"rounding": "up"},
    ],
    ids=str,
)
def test_refused_arguments(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Uniform(**given)


def test_refused_side_values() -> None:
    spec, two = TensorSpec((2, 3), torch.float32), torch.tensor([1.0, 2.0])
    symbols = torch.zeros(2, 3, dtype=torch.uint8)
    for minimum in ([0.0, 2.1], [1.1, 0.0]):
        with pytest.raises(ValueError, match="finite range"):
            Uniform(axis=0).decode(symbols, {"minimum": torch.tensor(minimum), "maximum": two}, spec, KEY)
    with pytest.raises(ValueError, match="finite range"):
        Uniform(quantile=1.0).decode(symbols, {"maximum": torch.tensor(-1e-9)}, spec, KEY)
    for step in (0.0, -1.0):
        with pytest.raises(ValueError, match="the step is"):
            StepQuantization(1.0).encoded_spec(spec, {"step": torch.tensor(step)})
    for shift in (-1.1, 1.1):
        with pytest.raises(ValueError, match="shifted"):
            StepQuantization(1.0, False, centroids=True).encoded_spec(spec, {"shift": torch.tensor(shift)})


# ------------------------------------------------------------------------------------------------- fixed steps

GOALS = {0.3: 0.753, 0.5: 0.617, 1.0: 0.348, 1.5: 0.178, 2.0: 0.0889, 3.0: 0.0222, 4.0: 0.0056}


def theory(step: float, dead_zone: float) -> tuple[float, float]:
    """Returns entropy and squared error for normal numbers, with a centroid for each cell, by integration."""
    edges = (dead_zone + np.arange(math.ceil(9 / step) + 1)) * step
    share = np.diff(special.ndtr(edges))
    moment = -np.diff(np.exp(-(edges**2) / 2)) / math.sqrt(2 * math.pi)
    share, moment = share[share > 1e-15], moment[share > 1e-15]
    zero = 1 - 2 * share.sum()
    entropy = -zero * math.log2(zero) - 2 * (share * np.log2(share)).sum()
    return float(entropy), float(1 - 2 * (moment**2 / share).sum())


def best(rate: float) -> tuple[float, float, float]:
    """Returns the least squared error at an entropy of `rate`, and its step and dead zone."""

    def step_of(dead_zone: float) -> float:
        return float(optimize.brentq(lambda step: theory(step, dead_zone)[0] - rate, 0.1, 7))

    zones = [(step_of(zone), zone) for zone in np.linspace(0.42, 0.6, 10)]
    return min((theory(step, zone)[1], step, zone) for step, zone in zones)


@pytest.mark.parametrize("rate", GOALS)
def test_rate_and_error_on_a_normal_source(rate: float) -> None:
    error, step, dead_zone = best(rate)
    assert error == pytest.approx(GOALS[rate], rel=0.01)
    assert 0.09 < rate - 0.5 * math.log2(1 / error) < 0.256  # above Shannon's bound
    x = normal(500_000, seed=5)
    stage = StepQuantization(step, dead_zone=dead_zone, centroids=True)
    y, side = stage.encode(x, KEY)
    spec = TensorSpec.of(x)
    counts = torch.bincount(y - y.min())
    assert stats.entropy(counts, base=2) == pytest.approx(rate, abs=0.006)
    nmse = float((stage.decode(y, side, spec, KEY) - x).double().square().sum() / x.double().square().sum())
    assert nmse == pytest.approx(error, rel=0.013)
    assert nmse <= 1.02 * GOALS[rate]
    coded = 8 * len(b"".join(Encoder([stage], ANS()).bind(spec).encode(x, KEY, {})[0])) / len(x)
    assert coded <= min(1.005 * rate + 0.008, 1.02 * rate), "real bytes"


def test_dead_zone_and_centroids() -> None:
    x = torch.tensor([0.69, 0.71, 1.69, 1.71, 2.69, 2.71, 0.0])
    y, side = StepQuantization(1.0, False, dead_zone=0.7, centroids=True).encode(torch.cat([x, -x]), KEY)
    assert y.tolist() == [0, 1, 1, 2, 2, 3, 0, 0, -1, -1, -2, -2, -3, 0]
    assert float(side["shift"]) == pytest.approx((-0.29 + 0.69 - 0.29 + 0.69 - 0.29) / 5)
    # the shift is the least-squares one
    x, stage = normal(10_000), StepQuantization(1.3, dead_zone=0.6, centroids=True)
    y, side = stage.encode(x, KEY)

    def error(shift: Tensor) -> float:
        decoded = stage.decode(y, {**side, "shift": shift}, TensorSpec.of(x), KEY)
        return float((decoded - x).double().square().sum())

    assert all(error(side["shift"]) < error(side["shift"] + other) for other in (-0.1, -0.01, 0.01, 0.1))
    assert error(side["shift"]) < 0.995 * error(torch.zeros(()))


def test_errors_of_steps() -> None:
    x = normal(300_000) + 0.013
    for step, rounding, expected, within in (
        (0.1, "nearest", 1 / 12, 0.01),
        (0.1, "stochastic", 1 / 6, 0.01),
        (0.1, "dithered", 1 / 12, 0.01),
        (7.0, "dithered", 1 / 12, 0.01),  # the error of dither does not depend on the rate
    ):
        stage = StepQuantization(step, False, rounding)
        error = (send(stage, x) - x).double() / step
        assert float(error.square().mean()) == pytest.approx(expected, rel=within)
        if stage.unbiased:
            assert abs(float(error.mean())) < 4 * math.sqrt(expected / len(x))
        if rounding == "dithered":
            assert abs(float(torch.corrcoef(torch.stack([error, x.double()]))[0, 1])) < 4 / math.sqrt(len(x))


def test_relative_steps_follow_the_scale() -> None:
    x = normal(1000)
    y, side = StepQuantization(0.2).encode(x, KEY)
    assert float(side["step"]) == pytest.approx(0.2 * float(x.square().mean().sqrt()), rel=1e-6)
    for dtype, factor in ((torch.float32, 2.0**-100), (torch.float32, 2.0**120), (torch.float64, 2.0**-1000)):
        scaled, other = StepQuantization(0.2).encode(x.to(dtype) * factor, KEY)
        assert float(other["step"]) == pytest.approx(float(side["step"]) * factor, rel=1e-6)
        assert int((scaled != y).sum()) <= (dtype == torch.float64)  # another precision


def test_too_many_steps() -> None:
    stage = StepQuantization(0.5, relative=False)
    x = torch.tensor([2.0**29, -(2.0**29), 0.3])
    assert stage.encode(x, KEY)[0].tolist() == [2**30, -(2**30), 1]
    assert torch.equal(send(stage, x), torch.tensor([2.0**29, -(2.0**29), 0.5]))
    for value in (2.0**29 + 64, -(2.0**30), 3e38):
        with pytest.raises(ValueError, match="more than 2\\^30 steps"):
            stage.encode(torch.tensor([1.0, value]), KEY)
    for given in ({"step": 0.0}, {"step": math.nan}, {"dead_zone": 0.0}, {"dead_zone": 1.1}, {"rounding": "up"}):
        with pytest.raises(ValueError, match="must be"):
            StepQuantization(**{"step": 1.0, **given})
    for given in ({"dead_zone": 0.6}, {"centroids": True}):
        with pytest.raises(ValueError, match="nearest for"):
            StepQuantization(1.0, rounding="stochastic", **given)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_absolute_steps(rounding: str) -> None:
    # the arrays of the battery within 2^30 steps
    encoder = Encoder([StepQuantization(0.01, False, rounding)])
    for check in (
        testing.checks.check_round_trip,
        testing.checks.check_unbiased,
        testing.checks.check_commutes_with_sum,
    ):
        check(encoder, None)


# --------------------------------------------------------------------------------------- rate_weight


def lagrangian(magnitudes: np.ndarray, sizes: np.ndarray, means: np.ndarray, weight: float) -> np.ndarray:
    """Returns (error in steps)² + weight · bits of each element, for geometric magnitudes with these means."""
    bits = np.log2(1 + means) + magnitudes * np.log2(1 + 1 / means) + (magnitudes > 0)
    return np.asarray((sizes - magnitudes) ** 2 + weight * bits)


def scaled_matrix(sigma: float = 1.0) -> Tensor:
    draw = np.random.default_rng(10)
    scales = np.exp(draw.normal(size=(60, 1))) * np.exp(draw.normal(size=(1, 80)))
    return torch.from_numpy(sigma * scales * draw.normal(size=(60, 80))).float()


@pytest.mark.parametrize("weight", [0.01, 0.1155, 1.0, 3.0, 50.0])
def test_rates_choose_as_all_candidates_compared(weight: float) -> None:
    cheapest = step_loops._cheapest
    for mean in (1e-12, 0.003, 0.2, 1.0, 7.0, 1e4):
        for size in np.random.default_rng(11).uniform(0, 9, 300):
            most = math.floor(size + 0.5)
            costs = lagrangian(np.arange(most + 1), size, np.full(most + 1, max(mean, 2.0**-30)), weight)
            found = cheapest(size, most, mean, weight)
            assert 0 <= found <= most
            assert costs[found] <= costs.min() + 1e-9


@pytest.mark.parametrize("weight", [0.05, 0.1155, 0.5])
def test_rates_only_pull_towards_zero_and_lower_the_lagrangian(weight: float) -> None:
    x = scaled_matrix(2.0)
    plain = x.round().int()
    moved, kept, excess = rate_distortion(x, 1.0, weight)
    assert bool((moved.abs() <= plain.abs()).all()) and bool((moved * plain >= 0).all())
    assert not torch.equal(moved, plain)
    sizes = x.double().abs().numpy()
    some = moved.numpy() != 0
    assert kept == some.sum() and excess == pytest.approx((sizes - moved.abs().numpy())[some].sum(), rel=1e-12)

    def total(symbols: Tensor) -> float:
        magnitudes = symbols.double().abs().numpy()
        means = magnitudes.sum(1, keepdims=True) * magnitudes.sum(0) / magnitudes.sum()
        return float(lagrangian(magnitudes, sizes, np.maximum(means, 2.0**-30), weight).sum())

    assert total(moved) < total(plain)


def test_rates_by_hand() -> None:
    x = torch.tensor([[3.9, 0.6, 0.0], [-4.1, 0.0, 0.0]])
    symbols, kept, excess = rate_distortion(x, 1.0, 0.2)
    # a mean of 5/9 (row 5, column 1, total 9): 1 costs 0.2 · (log₂(1 + 9/5) + 1) = 0.5, and saves 0.36 − 0.16 of the
    # error
    assert symbols.tolist() == [[4, 0, 0], [-4, 0, 0]]
    assert kept == 2 and excess == pytest.approx(-0.1 + 0.1, abs=1e-6)
    assert rate_distortion(torch.tensor([0.6]), 1.0, 0.001)[0].tolist() == [1]
    for zero in (torch.zeros(3, 4), torch.zeros(0), torch.tensor(0.0)):
        none, kept, excess = rate_distortion(zero, 1.0, 0.1)
        assert not none.any() and none.shape == zero.shape and (kept, excess) == (0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weight_0_is_plain_rounding(dtype: torch.dtype) -> None:
    x = scaled_matrix().to(dtype)
    plain, _ = StepQuantization(0.75, False).encode(x, KEY)
    symbols, _, _ = rate_distortion(x, 0.75, 0.0)
    assert torch.equal(symbols, plain)
    for other in (x.t(), x.view(60, 2, 40), x[::2, ::3]):
        moved, _ = StepQuantization(0.7, False, rate_weight=0.1).encode(other, KEY)
        assert torch.equal(moved, StepQuantization(0.7, False, rate_weight=0.1).encode(other.contiguous(), KEY)[0])


@pytest.mark.parametrize("coder", [CABAC(), ANS()], ids=str)
@pytest.mark.parametrize(("scaled", "most"), [(False, 0.05), (True, -0.02)])
def test_rates_against_dead_zones(coder: Coder, scaled: bool, most: float) -> None:
    """At equal bytes, a rate weight beats dead zones if scales differ, and is a little worse for one normal law."""
    draw = np.random.default_rng(10)
    scales = np.exp(draw.normal(size=(500, 1))) * np.exp(draw.normal(size=(1, 800))) if scaled else 1.0
    values = scales * draw.normal(size=(500, 800))
    x = torch.from_numpy(values / values.std()).float()

    def sent(**given: float) -> tuple[float, float]:
        stage = StepQuantization(relative=False, centroids=True, **given)
        y, side = stage.encode(x, KEY)
        size = len(memoryview(coder.encode(y, TensorSpec.of(y))))
        return size, float((stage.decode(y, side, TensorSpec.of(x), KEY) - x).square().mean())

    for zone in (0.5, 0.55, 0.6, 0.7):
        curve = sorted(sent(step=step, dead_zone=zone) for step in np.geomspace(0.8, 4, 9))
        sizes, errors = np.log([size for size, _ in curve]), np.log([error for _, error in curve])
        for step in (1.2, 1.8):
            size, error = sent(step=step, rate_weight=0.1155)
            # ANS does not use the scales
            allowed = 0.05 if isinstance(coder, ANS) else most
            assert math.log(error) <= np.interp(math.log(size), sizes, errors) + allowed
