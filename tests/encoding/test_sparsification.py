"""Sparsification: compares the kept elements, the errors and the bytes with theory."""

import math

import numpy as np
import pytest
import torch
from configured import built
from scipy import integrate, stats
from torch import Tensor

from fedq.encoding import (
    Encoder,
    EncodingStage,
    FixedWidth,
    Key,
    MessageError,
    RandomMask,
    ScaledSign,
    SparseMask,
    StateDictEncoder,
    TensorSpec,
    Threshold,
    TopK,
    schema_of,
)
from fedq.encoding.message import varint
from fedq.encoding.testing import KEY, Bound, reframe, wave


def top_k_bound(fraction: float) -> Bound:
    """Returns the bound: the largest magnitude that is dropped."""

    def bound(x: Tensor) -> float:
        magnitudes = np.sort(x.double().abs().reshape(-1).numpy())
        left = len(magnitudes) - max(1, round(fraction * len(magnitudes)))
        return float(magnitudes[left - 1]) if left > 0 else 0.0

    return bound


def threshold_bound(threshold: float) -> Bound:
    """Returns the bound: `threshold` root mean squares."""

    def bound(x: Tensor) -> float:
        unit = float(x.double().abs().max()) or 1.0
        return threshold * unit * float((x.double() / unit).square().mean().sqrt()) * (1 + 1e-6) + 2e-45

    return bound


def mask_bound(fraction: float) -> Bound:
    """Returns the bound: an element is dropped, or multiplied by the size of its cell."""

    def bound(x: Tensor) -> float:
        n = x.numel()
        size = -(-n // max(1, round(fraction * n)))
        return float(x.double().abs().max()) * max(1, size - 1) * (1 + torch.finfo(x.dtype).eps)

    return bound


STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (RandomMask(0.1), mask_bound(0.1)),
    (RandomMask(0.37, shared=True), mask_bound(0.37)),
    (RandomMask(0.5, scale=False), lambda x: float(x.double().abs().max())),
    (RandomMask(1.0), lambda x: 0.0),
    (TopK(0.1), top_k_bound(0.1)),
    (TopK(0.5), top_k_bound(0.5)),
    (TopK(1.0), top_k_bound(1.0)),
    (Threshold(1.0), threshold_bound(1.0)),
    (Threshold(0.3, relative=False), lambda x: 0.3 * (1 + 1e-7)),
    (Threshold(0.0), lambda x: 0.0),
]


def send(stage: EncodingStage, x: Tensor, key: Key = KEY) -> Tensor:
    y, side = stage.encode(x, key)
    return stage.decode(y, side, TensorSpec.of(x), key)


# ------------------------------------------------------------------------------------------------ random mask


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.1), (9, 0.5), (10, 0.3), (60, 0.1), (7, 0.9), (64, 0.25)])
def test_random_mask_keeps_each_element_of_a_cell_equally_often(n: int, fraction: float) -> None:
    k, draws = max(1, round(n * fraction)), 600
    sizes = np.array([n // k + (i < n % k) for i in range(k)])
    cell = np.repeat(np.arange(k), sizes)
    stage, x = RandomMask(fraction), torch.arange(1, n + 1, dtype=torch.float64)
    kept = np.zeros(n)
    for i in range(draws):
        back = send(stage, x, KEY.fold(str(i))).numpy()
        (places,) = back.nonzero()
        assert list(cell[places]) == list(range(k)), "not one element of each cell"
        np.testing.assert_array_equal(back[places], x.numpy()[places] * sizes)
        kept[places] += 1
    expected = draws / sizes[cell]
    chi = ((kept - expected) ** 2 / expected).sum()
    assert n == k or stats.chi2.sf(chi, n - k) > 1e-4


def test_random_mask_error_by_formula() -> None:
    # Σ (s − 1) x², with cells of 4, and of 3 at the end
    stage, x, spec = RandomMask(0.3), wave(100, dtype=torch.float64), TensorSpec((100,), torch.float64)
    sizes = np.repeat([4] * 10 + [3] * 20, [4] * 10 + [3] * 20)
    expected = float((torch.from_numpy(sizes - 1) * x.square()).sum())
    errors = []
    for i in range(1000):
        key = KEY.fold(str(i))
        y, side = stage.encode(x, key)
        assert y.shape == (30,)
        errors.append(float((stage.decode(y, side, spec, key) - x).square().sum()))
    assert abs(np.mean(errors) - expected) < 4 * np.std(errors) / math.sqrt(len(errors))
    assert expected == pytest.approx((1 / 0.3 - 1) * float(x.square().sum()), rel=0.04)


def test_random_mask_is_shared_or_each_clients_own() -> None:
    x, other = wave(1000), KEY._replace(client=KEY.client + 1)
    for shared in (True, False):
        stage = RandomMask(0.1, shared)
        assert torch.equal(stage.encode(x, KEY)[0], stage.encode(x, other)[0]) == shared
        assert not torch.equal(stage.encode(x, KEY)[0], stage.encode(x, KEY._replace(round=8))[0])
        assert stage.commutes_with_sum == shared
    assert RandomMask().unbiased
    assert not RandomMask(scale=False).unbiased
    kept = send(RandomMask(0.1, scale=False), x)
    assert torch.equal(kept[kept != 0], x[kept != 0])


def test_random_mask_costs_what_is_kept_and_stays_within_the_dtype() -> None:
    for n, k in ((0, 0), (1, 1), (3, 1), (10, 1), (25, 2), (1001, 100)):
        assert RandomMask(0.1).encode(wave(n), KEY)[0].shape == (k,)
        assert RandomMask(0.1).encoded_spec(TensorSpec((n,), torch.float32), {}).shape == (k,)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        limit = torch.finfo(dtype).max
        back = send(RandomMask(0.25), torch.tensor([limit, -limit] * 8, dtype=dtype))
        assert set(back.abs().tolist()) == {0.0, limit}


# ------------------------------------------------------------------------------------------------ top-k, threshold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_top_k_against_a_stable_sort(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(-6, 7, (40, 25))).to(dtype)  # many ties
    tiny = (wave(1000, dtype=torch.float64) * 50 * float(torch.finfo(dtype).smallest_normal)).to(dtype)
    for x in (coarse, coarse.t(), tiny, wave(1000, dtype=dtype), torch.zeros(50, dtype=dtype), -wave(7, dtype=dtype)):
        flat = x.reshape(-1)
        for fraction in (0.001, 0.013, 0.1, 0.5, 0.999, 1.0):
            k = max(1, round(fraction * len(flat)))
            order = np.sort(np.argsort(-flat.double().abs().numpy(), kind="stable")[:k])
            y, side = TopK(fraction).encode(x, KEY)
            assert np.flatnonzero(side["mask"]).tolist() == order.tolist()
            assert torch.equal(y, flat[order])
            back = TopK(fraction).decode(y, side, TensorSpec.of(x), KEY)
            assert torch.equal(back.reshape(-1), torch.where(side["mask"].bool(), flat, 0))


@pytest.mark.parametrize("name", ["norm", "laplace"])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
def test_top_k_error_of_known_sources(name: str, fraction: float) -> None:
    # the share of the energy in magnitudes below the quantile
    source = getattr(stats, name)
    limit = source.ppf(1 - fraction / 2)
    left, _ = integrate.quad(lambda v: 2 * v * v * source.pdf(v), 0, limit)
    total, _ = integrate.quad(lambda v: 2 * v * v * source.pdf(v), 0, math.inf)
    if name == "laplace":  # in closed form
        assert left / total == pytest.approx(1 - fraction * (1 + limit + limit**2 / 2))
    x = torch.from_numpy(source.ppf((np.arange(400_000) + 0.5) / 400_000))  # each quantile once
    for stage in (TopK(fraction), Threshold(limit / math.sqrt(total))):
        error = float((send(stage, x) - x).square().sum() / x.square().sum())
        assert error == pytest.approx(left / total, rel=3e-4)


def test_threshold_keeps_what_is_above() -> None:
    x = torch.tensor([[0.5, -0.5, 0.51], [-3.0, 0.0, -0.51]])
    y, side = Threshold(0.5, relative=False).encode(x, KEY)
    assert y.tolist() == x.reshape(-1)[[2, 3, 5]].tolist()
    assert side["mask"].tolist() == [0, 0, 1, 1, 0, 1]
    for scale in (1e-43, 1e-30, 1.0, 1e37):  # 7/5 of a root mean square is kept, 1/5 is dropped
        y, _ = Threshold(1.0).encode(torch.tensor([7.0, 1.0, -1.0, -7.0]) * scale, KEY)
        assert y.numel() == 2
    assert Threshold(1.0).encode(torch.tensor([5e-324, 1e308, 1.7e308], dtype=torch.float64), KEY)[0].numel() == 1
    for empty in (torch.zeros(9), torch.full((9,), 2.0), torch.zeros(0, 3)):  # no element is above the root mean square
        assert Threshold(1.0).encode(empty, KEY)[0].shape == (0,)
        assert torch.equal(send(Threshold(1.0), empty), torch.zeros_like(empty))


def test_stc_by_hand() -> None:
    # Sattler 2019, algorithm 1: each of the k largest elements becomes their mean magnitude with its own sign
    x = torch.tensor([0.1, -2.0, 0.2, 4.0, -0.3, 0.0, -3.0, 0.05, 0.0, 0.0])
    codec = StateDictEncoder(Encoder([TopK(0.3), ScaledSign()], FixedWidth()), threshold=0).bind(schema_of({"x": x}))
    message = codec.encode({"x": x}, KEY).message
    back = codec.decode(message, KEY).tensors["x"]
    assert back.tolist() == [0, -3, 0, 3, 0, 0, -3, 0, 0, 0]
    # the frame, the length of the mask, a bitmap, the magnitude, and three signs in a byte
    assert len(message) == 48 + 1 + (1 + 2) + 4 + 1


@pytest.mark.parametrize("name", ["top_k", "top_k_global", "threshold", "stc", "random_mask"])
def test_configured_uploads(name: str) -> None:
    """An upload of conf/encoder keeps the configured fraction of each tensor, or of all tensors together."""
    upload = built(name, "upload")
    assert upload.joint == (name == "top_k_global")
    x = {"small": wave(300, 100), "bias": wave(10), "large": 100 * wave(200, 100)}
    codec = upload.bind(schema_of(x))
    back, _ = codec.decode(codec.encode(x, KEY).message, KEY)
    assert torch.equal(back["bias"], x["bias"])
    if name == "threshold":
        return
    (stage, *_) = upload.encoder.stages
    assert isinstance(stage, TopK | RandomMask)
    kept = [int((back[part] != 0).sum()) for part in ("small", "large")]
    k = [round(stage.fraction * x[part].numel()) for part in ("small", "large")]
    if name == "top_k_global":
        # all kept elements are of the large tensor, whose values are a hundred times larger
        assert kept[0] == 0
        assert kept[1] <= sum(k)
        chosen = torch.topk(x["large"].abs().reshape(-1), sum(k)).indices
        assert int((back["large"].reshape(-1)[chosen] != 0).sum()) == kept[1] >= sum(k) - 5
    else:
        assert all(0 <= expected - found <= 5 for found, expected in zip(kept, k, strict=True))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_fractions_are_refused(fraction: float) -> None:
    for stage in (RandomMask, TopK):
        with pytest.raises(ValueError, match="fraction must be (a finite number, )?above 0 and at most 1"):
            stage(fraction)


def test_thresholds_and_integers_are_refused() -> None:
    for threshold in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold must be (a finite number, )?at least 0"):
            Threshold(threshold)
    for stage, _ in STAGES:
        with pytest.raises(ValueError, match="takes floating tensors"):
            Encoder([stage]).bind(TensorSpec((5,), torch.int64)).encode(torch.arange(5), KEY, {})


def test_masks_of_another_number_are_refused() -> None:
    x = wave(1000)
    codec = StateDictEncoder(Encoder([TopK(0.1)]), threshold=0).bind(schema_of({"x": x}))
    message = codec.encode({"x": x}, KEY).message
    spec = TensorSpec.symbols((1000,), 2)
    for ones in (0, 1, 99, 101, 1000):
        mask = (torch.arange(1000) < ones).to(torch.uint8)
        code = SparseMask().encode(mask, spec)
        body = varint(len(code)) + code + bytes(4 * ones)
        with pytest.raises(MessageError, match=f"the mask keeps {ones} elements, not 100"):
            codec.decode(reframe(message, body), KEY)
