"""Compares the errors of stages with few levels with the papers' formulas, and the rounding with numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import QSGD, EncodingStage, Key, NaturalCompression, TensorSpec, TernGrad, ThreeLevel
from fedq.encoding.testing import Bound, wave

KEY = Key(3)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def of_largest(factor: float) -> Bound:
    """Returns the bound: `factor` times the largest magnitude, and rounding of the dtype."""

    def bound(x: Tensor) -> float:
        info = torch.finfo(x.dtype)
        return float(x.double().abs().max()) * (factor + 2 * info.eps) + info.smallest_normal * info.eps

    return bound


def natural_gap(x: Tensor) -> float:
    """Returns the gap between the powers of two around the largest element."""
    power = math.ldexp(0.5, math.frexp(float(x.double().abs().max()))[1])
    return max(power, torch.finfo(x.dtype).smallest_normal)


STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (TernGrad(), of_largest(1)),
    (TernGrad(2.5), of_largest(1)),
    (ThreeLevel(), of_largest(0.5)),
    (ThreeLevel(1.75), of_largest(0.875)),
    (QSGD(), None),
    (QSGD(1, 7, "max"), of_largest(1)),
    (QSGD(8, 100, "max"), of_largest(1 / 8)),
    (QSGD(300, 16_384), None),
    (NaturalCompression(), natural_gap),
]


def sent(stage: EncodingStage, x: Tensor, key: Key = KEY) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    y, side = stage.encode(x, key)
    spec = stage.encoded_spec(TensorSpec.of(x), side)
    assert spec == TensorSpec.symbols(tuple(y.shape), spec.levels or 0)
    assert y.dtype == spec.dtype and (not y.numel() or 0 <= int(y.min()) <= int(y.max()) < (spec.levels or 0))
    return y, dict(side), stage.decode(y, side, TensorSpec.of(x), key)


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).standard_normal(400_000)).float()


def check_mean(stage: EncodingStage, x: Tensor, draws: int = 20_000) -> None:
    """Checks that each value of `x` is right on average, within 4.5 standard errors. Each element has its own draw."""
    copies = x[:, None].expand(len(x), draws)
    back = sent(stage, copies)[2].double()
    error = (back.mean(1) - x.double()).abs()
    assert bool((error <= 4.5 * back.std(1) / math.sqrt(draws) + 1e-12 * x.double().abs()).all()), error


def test_terngrad_probabilities_and_error(normal: Tensor) -> None:
    x = torch.tensor([-2.0, -1.5, -0.5, -1e-3, 0.0, 2e-4, 0.1, 1.0, 1.999, 2.0])
    copies = x.repeat(40_000)
    y = sent(TernGrad(), copies)[0].view(-1, len(x)).int() - 1
    assert bool((y * x.sign() >= 0).all()) and int(y[:, 4].abs().max()) == 0 and int(y[:, [0, -1]].abs().min()) == 1
    p = (x.abs() / 2).double()
    assert bool(((y.abs().double().mean(0) - p).abs() <= 4.5 * (p * (1 - p) / 40_000).sqrt()).all())
    _, side, back = sent(TernGrad(), normal)
    assert float(side["scale"]) == float(normal.abs().max())
    expected = float(side["scale"]) * float(normal.abs().double().sum()) - float(normal.double().square().sum())
    assert float((back - normal).double().square().sum()) == pytest.approx(expected, rel=0.01)


def test_terngrad_clips_to_root_mean_squares(normal: Tensor) -> None:
    assert TernGrad().unbiased and not TernGrad(2.5).unbiased
    _, side, back = sent(TernGrad(2.5), normal)
    rms = float(normal.double().square().mean().sqrt())
    assert float(side["scale"]) == pytest.approx(2.5 * rms, rel=1e-6)
    expected = normal.clamp(-2.5 * rms, 2.5 * rms).double()
    assert float((back.double() * expected).sum()) == pytest.approx(float(expected.square().sum()), rel=0.01)
    assert float(sent(TernGrad(100.0), normal)[1]["scale"]) == float(normal.abs().max())


@pytest.mark.parametrize("sparsity", [1.0, 1.3, 1.99])
def test_three_levels_are_numpys(normal: Tensor, sparsity: float) -> None:
    x = normal[:50_000].double()
    y, side, back = sent(ThreeLevel(sparsity), x)
    m = sparsity * np.abs(x.numpy()).max()
    assert float(side["scale"]) == m
    assert np.array_equal(y.numpy(), np.round(x.numpy() / m) + 1)
    assert np.array_equal(back.numpy(), np.round(x.numpy() / m) * m)
    assert sent(ThreeLevel(), torch.tensor([0.5, -0.5, 0.51, -0.51, 1.0]))[0].tolist() == [1, 1, 2, 0, 2]


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize(("levels", "bucket"), [(1, 64), (4, 512), (127, 100), (128, 1000), (3, 16_384)])
def test_qsgd_against_its_formulas(normal: Tensor, levels: int, bucket: int, norm: str) -> None:
    x = normal[:100_000]
    stage = QSGD(levels, bucket, norm)
    y, side, back = sent(stage, x)
    rows = np.pad(x.double().numpy(), (0, -len(x) % bucket)).reshape(-1, bucket)
    norms = np.linalg.norm(rows, axis=1) if norm == "l2" else np.abs(rows).max(1)
    np.testing.assert_allclose(side["norms"].numpy(), norms, rtol=1e-6)
    scaled = rows / norms[:, None] * levels
    symbols = np.pad(y.numpy().astype(np.int64), (0, -len(x) % bucket), constant_values=levels).reshape(-1, bucket)
    assert (np.abs(symbols - levels - scaled) <= 1 + 1e-5).all()
    np.testing.assert_allclose(
        back.numpy(), ((symbols - levels) / levels * norms[:, None]).reshape(-1)[: len(x)], rtol=1e-5
    )
    fraction = np.abs(scaled) % 1
    expected = ((norms[:, None] / levels) ** 2 * fraction * (1 - fraction)).sum()
    error = float((back.double() - x.double()).square().sum())
    assert error == pytest.approx(expected, rel=0.03)
    if norm == "l2":
        assert expected <= min(bucket / levels**2, math.sqrt(bucket) / levels) * float(x.double().square().sum())
    else:
        assert expected <= bucket / (4 * levels**2) * (norms**2).sum()


def test_qsgd_mean_of_rare_and_of_extreme_values() -> None:
    values = torch.tensor([-1.0, -0.3, -0.01, 0.0, 1e-3, 0.2, 0.77])
    for norm in ("l2", "max"):
        copies = values.repeat(30_000)
        back = sent(QSGD(2, len(values), norm), copies)[2].double().view(-1, len(values))
        error = (back.mean(0) - values).abs()
        assert bool((error <= 4.5 * back.std(0) / math.sqrt(30_000) + 1e-7).all()), error
        assert not back[:, 3].any()
    for dtype in DTYPES:  # a norm that overflows becomes the dtype's largest value
        x = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(sent(QSGD(4, 50), x)[2], x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_natural_compression(normal: Tensor, dtype: torch.dtype) -> None:
    x = (normal * 100).to(dtype)
    _, side, back = sent(NaturalCompression(), x)
    assert not side
    values, decoded = x.double().numpy(), back.double().numpy()
    low = np.where(values == 0, 0, np.ldexp(0.5, np.frexp(np.abs(values))[1]))
    assert (((np.abs(decoded) == low) | (np.abs(decoded) == 2 * low)) & (decoded * values >= 0)).all()
    error = ((decoded - values) ** 2).sum()
    assert error == pytest.approx(((np.abs(values) - low) * (2 * low - np.abs(values))).sum(), rel=0.02)
    assert error <= (values**2).sum() / 8
    info = torch.finfo(dtype)
    powers = torch.tensor([1.0, -2.0, 0.0, -0.0, info.smallest_normal, -0.25, 2.0**10], dtype=dtype)
    assert torch.equal(sent(NaturalCompression(), powers)[2], powers)
    denormal = torch.tensor([0.25, -0.5, 0.75], dtype=torch.float64).mul(info.smallest_normal).to(dtype)
    check_mean(NaturalCompression(), torch.tensor([4 / 3, -1.01, 1.99, 0.3], dtype=dtype))
    up = sent(NaturalCompression(), denormal[:, None].expand(3, 20_000))[2].double() / info.smallest_normal
    assert bool((up.mean(1) - torch.tensor([0.25, -0.5, 0.75])).abs().max() < 0.016)
    assert float(sent(NaturalCompression(), torch.tensor([info.max] * 999, dtype=dtype))[2].max()) == info.max


def test_natural_compression_counts_bits() -> None:
    widths = [NaturalCompression().encoded_spec(TensorSpec((1,), dtype), {}).levels for dtype in DTYPES]
    assert widths == [2**6, 2**9, 2**9, 2**12]


def test_natural_error_is_one_eighth_at_worst() -> None:
    x = torch.full((200_000,), 4 / 3)
    assert float((sent(NaturalCompression(), x)[2] - x).square().mean() / x[0] ** 2) == pytest.approx(1 / 8, rel=0.01)


def test_threads_and_refusals() -> None:
    x, threads = wave(300_000), torch.get_num_threads()
    try:
        for stage in (TernGrad(2.5), QSGD(4, 16_384), QSGD(4, 300)):
            scales = []
            for n in (1, 2):
                torch.set_num_threads(n)
                scales.append([value.tolist() for value in sent(stage, x)[1].values()])
            assert scales[0] == scales[1]
    finally:
        torch.set_num_threads(threads)
    for stage in (TernGrad(), ThreeLevel(), QSGD(), NaturalCompression()):
        with pytest.raises(ValueError, match=r"takes floating tensors of 16 to 64 bits, not torch\.int64"):
            stage.side_spec(TensorSpec((5,), torch.int64))
    half = TensorSpec((700,), torch.float16)
    for bad in (-1e-9, 70_000.0):
        for scaled in (TernGrad(), ThreeLevel()):
            with pytest.raises(ValueError, match="scale"):
                scaled.encoded_spec(half, {"scale": torch.tensor(bad)})
        with pytest.raises(ValueError, match="scale"):
            QSGD().encoded_spec(half, {"norms": torch.tensor([1.0, bad])})
    wrong = [lambda: TernGrad(0.0), lambda: TernGrad(math.inf), lambda: ThreeLevel(2.0), lambda: ThreeLevel(0.9)]
    wrong += [lambda: QSGD(0), lambda: QSGD(1 << 15), lambda: QSGD(4, 0), lambda: QSGD(4, 1 << 15)]
    wrong += [lambda: QSGD(4, 8, "l1")]
    for make in wrong:
        with pytest.raises(ValueError, match="must be"):
            make()
