"""Clipping at fixed limits, and at quantiles that the server's state follows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import (
    AdaptiveEncodingStage,
    AdaptiveQuantileClip,
    ClipByNorm,
    ClipByValue,
    Encoder,
    EncodingStage,
    Key,
    StateDictEncoder,
    TensorSpec,
    ZeroOutliers,
    schema_of,
)
from fedq.encoding.testing import KEY, Bound, wave


def beyond(limit: float) -> Bound:
    """Returns the bound: how far the largest element is beyond the limit."""
    return lambda x: max(0.0, float(x.double().abs().max()) - limit)


def whole(x: Tensor) -> float:
    """Returns the bound of a stage in which no element grows or changes its sign."""
    return float(x.double().abs().max())


STAGES: list[tuple[EncodingStage | AdaptiveEncodingStage, Bound | None]] = [
    (ClipByValue(0.5), beyond(0.5)),
    (ClipByNorm(2.0), whole),
    (AdaptiveQuantileClip(), whole),
    (AdaptiveQuantileClip(initial=0.5, by="value"), beyond(0.5)),
    (ZeroOutliers(), lambda x: whole(x) if whole(x) > 21 else 0.0),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fixed_limits_against_torch(dtype: torch.dtype) -> None:
    x = wave(40, 25, dtype=dtype) * 3
    y, side = ClipByValue(0.75).encode(x, KEY)
    assert not side
    assert torch.equal(y, x.clamp(-0.75, 0.75))
    length = float(torch.linalg.vector_norm(x.double()))
    for limit in (length * 1.01, length / 2, 1e-6):
        y, _ = ClipByNorm(limit).encode(x, KEY)
        expected = x.double() * min(1, limit / length)
        torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=6e-8)
    assert torch.equal(ClipByNorm(length * 1.01).encode(x, KEY)[0], x), "exact where nothing is to be done"


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([3e38, -3e38, 1.0]),
        torch.tensor([1.7e308, 1.7e308, -1e308], dtype=torch.float64),  # the norm overflows float64
        torch.full((9,), 1e-40),
        torch.tensor([5e-324, 1e-323], dtype=torch.float64),
        torch.tensor([65504.0, -65504.0], dtype=torch.float16),
    ],
    ids=str,
)
def test_norms_that_overflow_and_underflow(x: Tensor) -> None:
    limit = 1.0
    y, _ = ClipByNorm(limit).encode(x, KEY)
    if float(x.abs().max()) < 1:
        assert torch.equal(y, x)
    else:
        unit = x.double() / x.double().abs().max()
        expected = unit / torch.linalg.vector_norm(unit)
        torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-7)
        assert torch.equal(y, AdaptiveQuantileClip(initial=limit).encode(x, KEY, {"estimate": torch.tensor(1.0)})[0])
    assert torch.equal(ClipByNorm(1.0).encode(torch.zeros(3), KEY)[0], torch.zeros(3))


def settle(stage: AdaptiveEncodingStage, sizes: np.ndarray, rounds: int) -> list[float]:
    """Returns the estimate after each round.

    A row of `sizes` is a cohort; each client sends one element of its size.
    """
    state, estimates = stage.initial_state(TensorSpec((1,), torch.float64)), []
    for i in range(rounds):
        clients = [stage.encode(x, KEY, stage.params(state)) for x in torch.from_numpy(sizes[i % len(sizes), :, None])]
        state = stage.update_state(state, {"within": torch.stack([update["within"] for _, _, update in clients])})
        estimates.append(float(state["estimate"]))
    return estimates


@pytest.mark.parametrize(("quantile", "cohort"), [(0.5, 10), (0.8, 10), (0.2, 5), (0.5, 1)])
def test_the_estimate_finds_the_quantile(quantile: float, cohort: int) -> None:
    sizes = Key(1).generator().lognormal(1.0, 0.7, (250, cohort)) * np.where(np.arange(cohort) % 2, 1, -1)
    truth = float(np.quantile(np.abs(sizes), quantile))
    for stage in (AdaptiveQuantileClip(0.1, quantile, 0.2), AdaptiveQuantileClip(50.0, quantile, 0.2, by="value")):
        late = settle(stage, sizes, 250)[99:249]
        assert np.exp(np.mean(np.log(late))) == pytest.approx(truth, rel=0.1)
    # at the fixed point, the share of sizes within the estimate is the quantile
    assert float((np.abs(sizes[100:]) <= np.array(late)[:, None]).mean()) == pytest.approx(quantile, abs=0.05)


def test_one_step_by_hand() -> None:
    """Three of four clients are within the limit: C · exp(−0.2 · (0.75 − 0.5))."""
    stage = AdaptiveQuantileClip(1.0, 0.5, 0.2)
    assert settle(stage, np.array([[0.5, 1.0, -0.2, 7.0]]), 1) == [pytest.approx(math.exp(-0.05), rel=1e-6)]
    y, side, update = stage.encode(torch.tensor([3.0, 4.0]), KEY, {"estimate": torch.tensor(2.5)})
    torch.testing.assert_close(y, torch.tensor([1.5, 2.0]))
    assert not side
    assert update["within"].item() is False
    zero = ZeroOutliers(multiplier=2.0, increment=1.0)
    for value, kept, within in ((2.5, True, True), (5.9, True, False), (6.1, False, False), (-6.1, False, False)):
        x = torch.tensor([0.1, value])
        y, _, update = zero.encode(x, KEY, {"estimate": torch.tensor(2.5)})
        assert torch.equal(y, x if kept else torch.zeros(2))
        assert update["within"].item() is within


def test_zeroing_follows_the_largest() -> None:
    """With the defaults the limit grows from 10 to 1000 within three rounds. Only the wild client is zeroed."""
    stage = ZeroOutliers()
    estimates = settle(stage, np.full((1, 10), 1000.0), 4)
    assert estimates[0] == pytest.approx(10 * 10**0.98, rel=1e-5)
    assert max(estimates) > 1000
    x = torch.tensor([900.0, -1.0])
    params = {"estimate": torch.tensor(estimates[-1])}
    assert torch.equal(stage.encode(x, KEY, params)[0], x)
    assert torch.equal(stage.encode(x * 1e5, KEY, params)[0], torch.zeros(2))


def test_the_estimate_stays_a_positive_number() -> None:
    falling = settle(AdaptiveQuantileClip(1.0, 0.0, 90.0), np.zeros((1, 1)), 5)
    rising = settle(AdaptiveQuantileClip(1.0, 1.0, 90.0), np.full((1, 2), 3.4e38), 5)
    assert falling[-1] == 2**-126
    assert falling == sorted(falling, reverse=True)
    assert rising == sorted(rising)
    assert math.isfinite(rising[-1])
    # the estimate grows again
    assert settle(AdaptiveQuantileClip(2**-126, 0.5, 90.0), np.full((1, 2), 1.0), 1)[0] > 1e-20


def test_it_costs_four_bytes_down_and_one_up() -> None:
    encoder, schema = StateDictEncoder(rules={"x": Encoder([AdaptiveQuantileClip()])}), schema_of({"x": wave(5)})
    codecs = [encoder.bind(schema, reports=reports) for reports in (False, True)]
    adaptation = codecs[0].adaptation
    params = adaptation.params(adaptation.initial_state())
    silent, reporting = (codec.encode({"x": wave(5)}, KEY, params).message for codec in codecs)
    assert len(reporting) - len(silent) == 1
    assert params["x/0/estimate"].nbytes == 4
    assert adaptation.report_schema == {"x/0/within": TensorSpec((), torch.bool)}


def test_refusals() -> None:
    for make in (ClipByValue, ClipByNorm):
        for bad in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="limit must be"):
                make(bad)
        with pytest.raises(ValueError, match="floating"):
            make(1.0).side_spec(TensorSpec((3,), torch.int32))
    for make in (AdaptiveQuantileClip, ZeroOutliers):
        for name, bad in (("initial", 0.0), ("initial", 1e39), ("quantile", 1.1), ("rate", 0.0), ("rate", 101.0)):
            with pytest.raises(ValueError, match=f"{name} must be"):
                make(**{name: bad})
        with pytest.raises(ValueError, match="floating"):
            make().side_spec(TensorSpec((3,), torch.bool))
    with pytest.raises(ValueError, match="by must be"):
        AdaptiveQuantileClip(by="median")
    with pytest.raises(ValueError, match="increment must be"):
        ZeroOutliers(increment=-1.0)
    with pytest.raises(ValueError, match="multiplier must be"):
        ZeroOutliers(multiplier=0.0)
