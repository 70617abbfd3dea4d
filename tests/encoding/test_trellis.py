"""Compares TrellisQuantization with rate-distortion theory in real bytes, and with a search of all sequences."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import (
    ANS,
    CABAC,
    Coder,
    Encoder,
    EncodingStage,
    Key,
    MessageError,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    TrellisQuantization,
    schema_of,
)
from fedq.encoding.stages import trellis_loops
from fedq.encoding.stages.trellis import _bits, _subsets
from fedq.encoding.testing import Bound, check_coder, reframe

KEY = Key(11)
STATES = (4, 8, 16, 32)


def bound_of(stage: TrellisQuantization) -> Bound:
    """Returns the bound without rates: a step for values ½ apart in 4 subsets, and a step for the centroids."""

    def bound(x: Tensor) -> float:
        scale = float(x.double().square().mean().sqrt()) if stage.relative and x.numel() else 1.0
        return 2.01 * stage.step * (scale if math.isfinite(scale) else float(x.double().abs().max())) + 1e-44

    return bound


PLAIN = [TrellisQuantization(0.5, states, rate_weight=0) for states in STATES]
STAGES: list[tuple[EncodingStage, Bound | None]] = [(stage, bound_of(stage)) for stage in PLAIN]
STAGES += [(TrellisQuantization(2.0), None), (TrellisQuantization(0.3, 4), None)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(Key(seed).generator().normal(size=shape)).float()


def measured(stage: EncodingStage, coder: Coder, x: Tensor) -> tuple[float, float]:
    """Returns the bits an element of a real message, and the NMSE of the decoded tensor."""
    codec = StateDictEncoder(Encoder([stage], coder), threshold=0).bind(schema_of({"x": x}))
    message = codec.encode({"x": x}, KEY).message
    back, _ = codec.decode(message, KEY)
    error = (back["x"] - x).double().square().sum() / x.double().square().sum()
    return 8 * len(message) / x.numel(), float(error)


GOALS = [(1, 1.96, 0.281, 0.274), (2, 1.0, 0.0706, 0.0687), (3, 0.512, 0.0177, 0.0172)]


@pytest.mark.parametrize("coder", [ANS(), CABAC(signed=False)], ids=str)
@pytest.mark.parametrize(("bits", "step", "of_8", "of_32"), GOALS)
def test_errors_of_a_normal_source(bits: int, step: float, of_8: float, of_32: float, coder: Coder) -> None:
    # NNCodec has 0.333, 0.081 and 0.0197, and the best scalar quantiser has 0.348, 0.0889 and 0.0222
    x = normal(300, 1000)
    for states, goal in ((8, of_8), (32, of_32)):
        found, error = measured(TrellisQuantization(step, states), coder, x)
        assert bits - 0.04 < found <= bits
        assert error < {1: 0.30, 2: 0.075, 3: 0.0187}[bits]
        assert 4.0**-bits < error * 4 ** (found - bits) < goal  # the curve falls by 6 dB a bit


def test_more_states_are_better() -> None:
    x = normal(200, 1000, seed=1)
    gaps = []
    for states in STATES:
        bits, error = measured(TrellisQuantization(1.0, states), ANS(), x)
        gaps.append(10 * math.log10(error * 4**bits))
    assert gaps == pytest.approx([0.58, 0.50, 0.44, 0.38], abs=0.03)  # dB above Shannon's bound


def test_rows_of_different_scale_and_few_bits() -> None:
    scales = torch.logspace(-2, 0, 200)[:, None] * torch.logspace(-1, 0, 500)
    x = normal(200, 500, seed=2) * scales
    rates = np.array([measured(TrellisQuantization(step), CABAC(signed=False), x) for step in (1.5, 2.0, 2.7)])
    bits, error = measured(StepQuantization(2.2, rate_weight=0.1, centroids=True), CABAC(), x)
    same = float(np.interp(math.log(error), np.log(rates[:, 1]), rates[:, 0]))
    assert 0.2 < bits < 0.8
    assert same < 0.95 * bits, "at the same error"


@pytest.mark.parametrize("states", STATES)
def test_the_search_finds_the_best_of_all_sequences(states: int) -> None:
    spec, stage = TensorSpec((6,), torch.float32), TrellisQuantization(2.0, states, relative=False)
    centroids, classes = np.array([-0.2, -0.1]), np.zeros(6, np.uint8)
    side = {"zero": torch.tensor(-0.1), "shift": torch.tensor(-0.05)}
    sequences = torch.tensor(list(itertools.product(range(5), repeat=6)), dtype=torch.int32)
    decoded = torch.stack([stage.decode(sequence, side, spec, KEY) for sequence in sequences]).double()
    for weighted, seed in itertools.product((False, True), range(8)):
        costs = np.array([[0.3], [0.2]], np.float32) * weighted
        paid = ((sequences > 0) * (costs[0, 0] + costs[1, 0] * sequences)).sum(1)
        x, found = normal(6, seed=seed) * 1.2, np.zeros(6, np.int32)
        trellis_loops.trellis_search(x.numpy(), classes, costs, centroids, _subsets(states), found)
        total = (decoded - x).square().sum(1) + paid
        own = total[(sequences == torch.from_numpy(found)).all(1)]
        # with costs, the search tries only the likeliest values near 0
        assert float(own) <= float(total.min()) * (1.05 if weighted else 1) + 1e-5


def test_classes_are_of_the_others() -> None:
    rows = np.zeros((40, 50), np.int32)
    rows[:, 7], rows[3] = 4, 4
    classes = np.empty(rows.shape, np.uint8)
    counts = trellis_loops.trellis_classes(rows, classes)
    assert counts.sum(0).tolist() == [2000, 89, 4 * 89]
    assert classes[3, 7] == classes.max() > classes[3, 9] == classes[3, 8]
    assert classes[9, 9] == classes.min() < classes[9, 7] == classes[8, 7]
    rows[9, 9] = 1000  # the class does not depend on the element itself
    again = np.empty(rows.shape, np.uint8)
    trellis_loops.trellis_classes(rows, again)
    assert again[9, 9] <= classes[9, 9]


def test_costs_are_those_of_the_counts() -> None:
    # half of a million symbols are 0; the others are geometric from 1 on with ratio ¾
    (start, slope) = _bits(np.array([[1e6, 5e5, 4 * 5e5]]))[:, 0]
    assert slope == pytest.approx(math.log2(4 / 3), abs=1e-4)
    assert start + slope == pytest.approx(-math.log2(0.5 * 0.25) + math.log2(0.5), abs=1e-4)
    assert np.isfinite(_bits(np.zeros((64, 3)))).all()


def test_segments_are_apart() -> None:
    stage, x = TrellisQuantization(1.0, relative=False), normal(3000)
    y, side = stage.encode(x, KEY)
    back = stage.decode(y, side, TensorSpec.of(x), KEY)
    assert float(y[1024:2048].float().std()) > 0
    for part in (slice(0, 1024), slice(1024, 2048), slice(2048, 3000)):
        own = stage.decode(y[part], side, TensorSpec.of(x[part]), KEY)
        assert torch.equal(own, back[part])
    for part in (slice(1, 1025), slice(1023, 2047)):
        own = stage.decode(y[part], side, TensorSpec.of(x[part]), KEY)
        assert not torch.equal(own, back[part])


def test_large_values_keep_the_state() -> None:
    # so large that float32 cannot separate the subsets
    for dtype, most in ((torch.float32, 2**28), (torch.float64, 2**28)):
        x = (normal(500) * most / 8).to(dtype)
        stage = TrellisQuantization(1.0, relative=False, rate_weight=0)
        y, side = stage.encode(x, KEY)
        back = stage.decode(y, side, TensorSpec.of(x), KEY)
        assert float((back - x).abs().max()) <= (40 if dtype == torch.float32 else 1.1)
    with pytest.raises(ValueError, match="2\\^28 steps"):
        stage.encode(torch.tensor([2.0**28 * 1.01]), KEY)


def test_centroids_are_means() -> None:
    x, stage = normal(20_000), TrellisQuantization(2.0)
    y, side = stage.encode(x, KEY)

    def error(**other: Tensor) -> float:
        return float((stage.decode(y, {**side, **other}, TensorSpec.of(x), KEY) - x).double().square().sum())

    for name in ("zero", "shift"):
        assert side[name] < 0
        assert all(error() < error(**{name: side[name] + more}) for more in (-0.1, -0.01, 0.01, 0.1))


def test_hostile_values() -> None:
    stage, spec = TrellisQuantization(1.0), TensorSpec((3,), torch.float32)
    _, side = stage.encode(normal(3), KEY)
    for symbol in (-1, -(2**31), 2**30 + 1, 2**31 - 1):
        with pytest.raises(ValueError, match="symbol"):
            stage.decode(torch.tensor([0, symbol, 0], dtype=torch.int32), side, spec, KEY)
    for name, values in {"step": (0, -1, math.nan), "zero": (1.1, math.nan), "shift": (-1.1, math.inf)}.items():
        for value in values:
            with pytest.raises(ValueError, match="step"):
                stage.encoded_spec(spec, {**side, name: torch.tensor(float(value))})
    for given in ({"step": 0.0}, {"step": math.inf}, {"states": 6}, {"rate_weight": -1.0}, {"rate_weight": math.nan}):
        with pytest.raises(ValueError, match="must be"):
            TrellisQuantization(**{"step": 1.0, **given})
    large = TrellisQuantization(1e30, relative=False)
    decoded = large.decode(torch.tensor([2**30, 0, 2**30], dtype=torch.int32), {**side}, spec, KEY)
    assert bool(decoded.isfinite().all())


def test_any_weight_is_finite() -> None:
    for weight in (1e3, 1e6):
        y, _ = TrellisQuantization(1.0, rate_weight=weight).encode(normal(5000), KEY)
        assert len(y.unique()) == 1, "no bits at all"


def test_unsigned_cabac() -> None:
    coder, n = CABAC(signed=False), 20_000
    for levels in (None, 2, 300):
        check_coder(coder, levels, torch.int32)
    x = (normal(100, n // 100).abs() * 1.5).int()
    spec = TensorSpec.of(x)
    signs = len(CABAC().encode(x, spec)) - len(coder.encode(x, spec))
    assert signs == pytest.approx(int(x.count_nonzero()) / 8, abs=10)
    with pytest.raises(ValueError, match="below 0"):
        coder.encode(x - 1, spec)
    encoder = StateDictEncoder(Encoder([], coder), threshold=0, rules={"x": Encoder([TrellisQuantization(1.0)], coder)})
    codec = encoder.bind(schema_of({"x": normal(50, 40)}))
    message = codec.encode({"x": normal(50, 40)}, KEY).message
    for i in range(44, len(message) - 4):  # every byte of the payload
        body = bytearray(message[44:-4])
        body[i - 44] ^= 0x5A
        try:
            back, _ = codec.decode(reframe(message, bytes(body)), KEY)
        except MessageError:
            continue
        assert bool(back["x"].isfinite().all())
