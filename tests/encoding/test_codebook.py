"""Compares the levels of codebooks with scipy and published tables, and the assignments with brute force."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from fedq.encoding import (
    EncodingStage,
    Key,
    KMeans,
    LloydMax,
    Logarithmic,
    NormalFloat,
    ProductQuantization,
    TensorSpec,
)
from fedq.encoding.stages.levels import nearest, normal_levels, quantile_levels
from fedq.encoding.testing import Bound, wave

KEY = Key(3)
NF4 = [  # bitsandbytes, functional.py, and QLoRA (Dettmers 2023), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def of_largest(factor: float) -> Bound:
    """Returns the bound: `factor` times the largest magnitude, and rounding of the dtype."""

    def bound(x: Tensor) -> float:
        info = torch.finfo(x.dtype)
        return float(x.double().abs().max()) * (factor + 2 * info.eps) + 2 * info.smallest_normal * info.eps

    return bound


STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (LloydMax(), None),
    (LloydMax(1), None),
    (LloydMax(8), None),
    (KMeans(), of_largest(2)),
    (KMeans(8, 3), of_largest(2)),
    (Logarithmic(), of_largest(1 / 4)),
    (Logarithmic(8, 1.1), of_largest((1 - 1 / 1.1) / 2)),
    (NormalFloat(), of_largest(0.152)),
    (NormalFloat(2, 7), of_largest(0.5)),
    (NormalFloat(8, 1000), of_largest(0.0634)),
    (ProductQuantization(iterations=2), of_largest(2)),
    (ProductQuantization(3, 4), of_largest(2)),
]


def sent(stage: EncodingStage, x: Tensor, key: Key = KEY) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    y, side = stage.encode(x, key)
    spec = stage.encoded_spec(TensorSpec.of(x), side)
    assert spec == TensorSpec.symbols(tuple(y.shape), spec.levels or 0)
    assert y.dtype == spec.dtype and (not y.numel() or 0 <= int(y.min()) <= int(y.max()) < (spec.levels or 0))
    return y, dict(side), stage.decode(y, side, TensorSpec.of(x), key)


def nmse(stage: EncodingStage, x: Tensor) -> float:
    x = x.double()
    return float((sent(stage, x.float())[2].double() - x).square().mean() / x.var())


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).standard_normal(400_000))


# ------------------------------------------------------------------------------------------- assignment


def test_nearest_is_brute_force(normal: Tensor) -> None:
    hard = {
        "even": torch.linspace(-2, 2, 256),
        "two": torch.tensor([-1.0, 1.0]),
        "one": torch.tensor([0.3]),
        "doubled": torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.0, 2.0]),
        "wide range": torch.cat((-torch.logspace(30, -38, 100), torch.zeros(1), torch.logspace(-38, 30, 100))),
        "hardly differ": 1 + torch.arange(200) * 2e-7,
        "crowded": torch.linspace(0.5, 0.53, 40),
        "beyond float32": torch.tensor([-1e300, -1.0, 0.1, 1e300]),
        "random": torch.sort(normal[:200]).values,
    }
    for name, levels in hard.items():
        levels = levels.double()
        thresholds = (levels[1:] / 2 + levels[:-1] / 2).float()
        for scale in (1.0, 1e-3, 1e30, 1e-39):
            x = torch.cat(
                (normal[:30_000].float() * scale, thresholds, levels.float().clamp(-3e38, 3e38), 1 + wave(100))
            )
            x = torch.cat((x, torch.nextafter(thresholds, torch.tensor(math.inf)), torch.zeros(2), -torch.zeros(2)))
            x = x[x.isfinite()]
            found = nearest(x, levels)
            assert found.dtype == torch.uint8
            expected = np.searchsorted(thresholds.numpy(), x.numpy())
            assert np.array_equal(found.numpy(), expected), name
            small = nearest(x[:1000], levels)  # few elements take another path
            assert torch.equal(small, found[:1000])
            assert torch.equal(nearest(x.flip(0)[::3], levels), found.flip(0)[::3])
        distance = (normal[:5000, None] - levels).abs()
        chosen = distance.gather(1, nearest(normal[:5000], levels).long()[:, None])[:, 0]
        assert torch.equal(chosen, distance.amin(1)), name
    x = normal.half()
    assert np.array_equal(nearest(x, hard["random"]).numpy(), nearest(x.float(), hard["random"]).numpy())


# ------------------------------------------------------------------------------------------------ Lloyd–Max


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_is_the_optimum_by_integration(bits: int) -> None:
    levels = normal_levels(bits).numpy()
    edges = np.concatenate(([-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]))
    assert len(levels) == 2**bits and (np.diff(levels) > 0).all() and np.array_equal(levels, -levels[::-1])
    some = range(0, 2**bits, max(1, 2**bits // 16))
    for i in some:
        inside = [integrate.quad(lambda t, k=k: t**k * stats.norm.pdf(t), edges[i], edges[i + 1])[0] for k in (0, 1)]
        assert levels[i] == pytest.approx(inside[1] / inside[0], abs=1e-9)
    # at the optimum the error is 1 − E[Q²], as E[x|Q] = Q
    error = 1 - (np.diff(stats.norm.cdf(edges)) * levels**2).sum()
    published = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}  # Max 1960, table I
    assert error == pytest.approx(
        published.get(bits, math.sqrt(3) * math.pi / 2 / 4**bits), rel=4e-3 if bits < 6 else 0.04
    )


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (8, 4.12e-5)])
def test_lloyd_max_error_of_a_normal_tensor(normal: Tensor, bits: int, error: float) -> None:
    for x in (normal, normal * 1e-3 + 5e-3, normal * 1e30, normal.view(400, -1).t()):
        assert nmse(LloydMax(bits), x) == pytest.approx(error, rel=0.02)


def test_lloyd_max_side_values(normal: Tensor) -> None:
    x = normal * 3 - 7
    _, side, _ = sent(LloydMax(), x)
    assert float(side["mean"]) == pytest.approx(float(x.mean()), rel=1e-12)
    assert float(side["deviation"]) == pytest.approx(float(x.std(correction=0)), rel=1e-12)
    for dtype in (torch.float16, torch.float32, torch.float64):
        constant = torch.full((100,), 0.1, dtype=dtype)
        assert torch.equal(sent(LloydMax(), constant)[2], constant)
    # a deviation that is tiny compared with the mean is exact enough
    assert nmse(LloydMax(4), torch.tensor(1e4) + normal) == pytest.approx(0.0095, rel=0.05)


# -------------------------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize(("name", "bits", "error"), [
    ("uniform", 1, 4**-1), ("uniform", 4, 4**-4), ("uniform", 8, 4**-8),
    ("normal", 1, 0.3634), ("normal", 2, 0.1175), ("normal", 4, 0.009501),
    ("laplace", 2, 0.1762), ("laplace", 3, 0.0545), ("laplace", 4, 0.0154),  # Paez and Glisson 1972
])  # fmt: skip
def test_k_means_finds_the_known_optimum(name: str, bits: int, error: float) -> None:
    draw = np.random.default_rng(1)
    x = {
        "uniform": lambda n: draw.random(n) + 3,
        "normal": draw.standard_normal,
        "laplace": lambda n: draw.laplace(0, 1, n),
    }
    assert nmse(KMeans(bits, 300), torch.from_numpy(x[name](400_000))) == pytest.approx(error, rel=0.025)


def test_k_means_never_gets_worse(normal: Tensor) -> None:
    x64 = normal[:20_000]
    tensors = {
        "normal": x64, "heavy tails": x64**5, "one side": x64.relu(), "few": (x64 * 2).round(), "tiny": x64 * 1e-42,
        "two clusters": x64 * 1e-3 + (x64 > 0), "far": x64 + 1e4, "outlier": torch.cat((x64, torch.tensor([1e6]))),
    }  # fmt: skip
    for name, x in tensors.items():
        for bits in (1, 3, 8):
            errors = [nmse(KMeans(bits, n), x.double()) for n in (0, 1, 20)]
            assert all(b <= a * 1.001 + 1e-12 for a, b in pairwise(errors)), (name, bits, errors)
    assert nmse(KMeans(8), x64**5) < 0.02 * nmse(LloydMax(8), x64**5)


def test_k_means_levels_are_the_means_of_their_elements(normal: Tensor) -> None:
    y, side, _ = sent(KMeans(3, 500), normal.float())
    for i in range(8):
        assert float(side["levels"][i]) == pytest.approx(float(normal[y == i].mean()), abs=6e-3)
    values = torch.tensor([-5.0, -1.0, 0.25, 7.0]).repeat_interleave(torch.tensor([10, 1000, 200, 3]))
    torch.testing.assert_close(sent(KMeans(4), values)[2], values, rtol=0, atol=2e-6)
    a, b = (KMeans(4).encode(normal.float(), key) for key in (KEY, KEY.fold("other")))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1]["levels"], b[1]["levels"])


# --------------------------------------------------------------------------- normal float, logarithmic, product


def test_normal_float_is_nf4(normal: Tensor) -> None:
    np.testing.assert_allclose(quantile_levels(4).numpy(), NF4, atol=1e-6)
    for bits in range(2, 9):
        levels = quantile_levels(bits)
        n = 1 << bits
        top = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
        up, down = (stats.norm.ppf(np.linspace(0.5, top, k)) for k in (n // 2 + 1, n // 2))
        expected = np.concatenate((-down[:0:-1], up)) / up[-1]
        np.testing.assert_allclose(levels.numpy(), expected, atol=1e-9)
    for size, block in ((1000, 64), (7 * 64, 64), (1, 64), (70_001, 1000), (140_000, 7)):
        x = normal[:size].float() * torch.linspace(1e-3, 1, size)
        x[: min(block, size) - 1] = 0
        y, side, back = sent(NormalFloat(4, block), x)
        rows = torch.nn.functional.pad(x, (0, -size % block)).view(-1, block)
        scales = rows.abs().amax(1)
        assert torch.equal(side["scales"], scales)
        normalised = (rows / scales.clamp(min=1e-30)[:, None]).reshape(-1)[:size]
        levels = quantile_levels(4).float()
        assert torch.equal(y, (normalised[:, None] - levels).abs().argmin(1).to(torch.uint8))
        expected = levels[y.long()] * scales.repeat_interleave(block)[:size]
        torch.testing.assert_close(back, expected, rtol=1e-6, atol=0)
        assert torch.equal(back[x == 0], x[x == 0])
        assert torch.equal(
            back[x.abs() == scales.repeat_interleave(block)[:size]],
            x[x.abs() == scales.repeat_interleave(block)[:size]],
        )


@pytest.mark.parametrize(("bits", "base"), [(2, 2.0), (4, 2.0), (5, 1.5), (8, 1.1)])
def test_logarithmic_levels_and_relative_error(normal: Tensor, bits: int, base: float) -> None:
    x = normal[:50_000].double()
    y, side, back = sent(Logarithmic(bits, base), x)
    largest, count = float(x.abs().max()), 2 ** (bits - 1) - 1
    assert float(side["scale"]) == largest and int(y.max()) == 2 * count
    least = largest * base ** (1 - count)
    allowed = {0.0} | {sign * largest * base**-k for k in range(count) for sign in (-1, 1)}
    assert set(back.unique().tolist()) <= allowed
    error = (back - x).abs()
    far = x.abs() >= least
    assert bool((error[far] <= x.abs()[far] * (base - 1) / (base + 1) * (1 + 1e-9)).all())
    assert bool((error[~far] <= least / 2 * (1 + 1e-9)).all())
    assert bits == 2 or float((error[far] / x.abs()[far]).max()) > 0.9 * (base - 1) / (base + 1)


def test_product_quantisation(normal: Tensor) -> None:
    # at 2 bits an element, the best scalar quantiser has 0.1175, and Shannon's bound is 1/16
    assert 1 / 16 < nmse(ProductQuantization(), normal[:200_000]) < 0.108
    x = normal[:20_003].float()
    for dim, bits in ((4, 6), (7, 3), (1, 4)):
        y, side, back = sent(ProductQuantization(dim, bits, 3), x)
        n = len(x) // dim
        vectors = x[: n * dim].view(n, dim)
        distance = (vectors[:, None] - side["centroids"]).double().square().sum(2)
        assert y.shape == (n,)
        assert torch.allclose(distance.gather(1, y.long()[:, None])[:, 0], distance.amin(1), atol=1e-5)
        assert torch.equal(back[: n * dim].view(n, dim), side["centroids"][y.long()])
        assert torch.equal(back[n * dim :], x[n * dim :])
    errors = [nmse(ProductQuantization(4, 6, n), x) for n in (0, 1, 3, 20)]
    assert errors[0] > 1.1 * errors[3] and all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    y, side, _ = sent(ProductQuantization(4, 4, 100), x[:20_000])  # after convergence centroids are means
    for i in range(16):
        torch.testing.assert_close(x[:20_000].view(-1, 4)[y == i].mean(0), side["centroids"][i], atol=0.02, rtol=0)
    few = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 0.5]])[torch.arange(999) % 3].reshape(-1)
    torch.testing.assert_close(sent(ProductQuantization(2, 8), few)[2], few)
    torch.testing.assert_close(sent(ProductQuantization(4, 8), x[:402])[2], x[:402])  # fewer vectors than centroids
    assert torch.equal(sent(ProductQuantization(4, 8), x[:3])[2], x[:3])
    a, b = (ProductQuantization(4, 5).encode(normal, key)[0] for key in (KEY, KEY.fold("other")))
    assert not torch.equal(a, b)


def test_threads_do_not_matter(normal: Tensor) -> None:
    threads, x = torch.get_num_threads(), normal.float()
    try:
        for stage in (LloydMax(4), KMeans(4, 5), NormalFloat(4, 16_384), ProductQuantization(4, 4, 3)):
            results = []
            for n in (1, 2):
                torch.set_num_threads(n)
                y, side, _ = sent(stage, x)
                results.append([y.tolist(), *(value.tolist() for value in side.values())])
            assert results[0] == results[1], stage
    finally:
        torch.set_num_threads(threads)


def test_refusals() -> None:
    half, one = TensorSpec((100,), torch.float16), torch.tensor(1.0)
    for stage in (LloydMax(), KMeans(), Logarithmic(), NormalFloat(), ProductQuantization()):
        with pytest.raises(ValueError, match=r"takes floating tensors of 16 to 64 bits, not torch\.int64"):
            stage.side_spec(TensorSpec((5,), torch.int64))
    for bad in (torch.tensor(-1e-9), torch.tensor(70_000.0)):
        with pytest.raises(ValueError, match="scale"):
            LloydMax().encoded_spec(half, {"mean": one, "deviation": bad})
        with pytest.raises(ValueError, match="scale"):
            Logarithmic().encoded_spec(half, {"scale": bad})
        with pytest.raises(ValueError, match="scale"):
            NormalFloat().encoded_spec(half, {"scales": torch.stack((one, bad))})
    with pytest.raises(ValueError, match="scale"):
        LloydMax().encoded_spec(half, {"mean": torch.tensor(-70_000.0), "deviation": one})
    with pytest.raises(ValueError, match="sorted"):
        KMeans(1).encoded_spec(half, {"levels": torch.tensor([1.0, 0.5])})
    wrong = [lambda: LloydMax(0), lambda: LloydMax(9), lambda: KMeans(9), lambda: KMeans(4, -1), lambda: Logarithmic(1)]
    wrong += [lambda: Logarithmic(4, 1.0), lambda: Logarithmic(4, math.inf), lambda: NormalFloat(1)]
    wrong += [lambda: NormalFloat(4, 0), lambda: NormalFloat(4, 16_385), lambda: ProductQuantization(0)]
    wrong += [lambda: ProductQuantization(4, 13), lambda: ProductQuantization(4, 8, -1)]
    for make in wrong:
        with pytest.raises(ValueError, match="must be"):
            make()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("outlier", [30.0, 1000.0])
def test_k_means_keeps_its_levels_with_an_outlier(bits: int, outlier: float) -> None:
    """One level is the outlier; the others are as good as Lloyd's levels for the normal distribution (Max 1960)."""
    x = torch.from_numpy(np.random.default_rng(3).normal(size=20_000)).float()
    alone = float((decoded_by(KMeans(bits), x) - x).square().mean())
    x[77] = outlier
    back = decoded_by(KMeans(bits), x)
    assert len(back.unique()) == 2**bits
    assert float((back - x).square().mean()) < {2: 1.7, 4: 1.25}[bits] * alone  # with one level fewer: 1.63, 1.14


def decoded_by(stage: EncodingStage, x: Tensor) -> Tensor:
    y, side = stage.encode(x, KEY)
    return stage.decode(y, side, TensorSpec.of(x), KEY)
