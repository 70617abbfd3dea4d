"""Compares the scales of signs with numpy, and the errors with the theory of the normal distribution."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import EncodingStage, Key, OneBitTwoMeans, ScaledSign, TensorSpec
from fedq.encoding.testing import Bound, wave

KEY = Key(3)


def magnitude(x: Tensor) -> float:
    """Returns the bound of a stage that keeps signs and decodes no magnitude above the largest."""
    return float(x.double().abs().max()) * (1 + 1e-6)


STAGES: list[tuple[EncodingStage, Bound | None]] = [(ScaledSign(), magnitude), (OneBitTwoMeans(), magnitude)]


def sent(stage: EncodingStage, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    y, side = stage.encode(x, KEY)
    assert stage.encoded_spec(TensorSpec.of(x), side) == TensorSpec(tuple(y.shape), torch.uint8, 2)
    return y, dict(side), stage.decode(y, side, TensorSpec.of(x), KEY)


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).standard_normal(500_000))


def test_squared_error_of_a_normal_tensor(normal: Tensor) -> None:
    for stage in (ScaledSign(), OneBitTwoMeans()):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = normal.to(dtype)
            error = (x.double() - sent(stage, x)[2].double()).square().sum() / x.double().square().sum()
            assert float(error) == pytest.approx(1 - 2 / math.pi, rel=0.006)


def test_scales_are_the_means(normal: Tensor) -> None:
    for x in (normal, normal.exp() - 2, normal[:7], wave(131_072 * 2 + 3), wave(30, 40).t(), normal.half()):
        values = x.double().numpy().reshape(-1)
        y, side, back = sent(ScaledSign(), x)
        assert np.array_equal(y.numpy().reshape(-1), values >= 0)
        assert float(side["scale"]) == pytest.approx(np.abs(values).mean(), rel=1e-7)
        np.testing.assert_allclose(back.double().numpy().reshape(-1), np.where(values >= 0, 1, -1) * back.max().item())
        y, side, back = sent(OneBitTwoMeans(), x)
        assert float(side["positive"]) == pytest.approx(values[values >= 0].mean(), rel=1e-7)
        assert float(side["negative"]) == pytest.approx(-values[values < 0].mean(), rel=1e-7)
        if x.dtype != torch.float16:
            assert float(back.double().sum()) == pytest.approx(values.sum(), abs=3e-7 * np.abs(values).sum())
        one, two = (
            (values - sent(s, x)[2].double().numpy().reshape(-1)) ** 2 for s in (ScaledSign(), OneBitTwoMeans())
        )
        assert two.sum() <= one.sum() * (1 + 1e-3)


def test_zero_counts_as_positive() -> None:
    x = torch.tensor([0.0, -0.0, -3.0, 1.0])
    y, side, back = sent(ScaledSign(), x)
    assert (y.tolist(), back.tolist(), float(side["scale"])) == ([1, 1, 0, 1], [1, 1, -1, 1], 1.0)
    y, side, back = sent(OneBitTwoMeans(), x)
    assert (y.tolist(), float(side["negative"]), float(side["positive"])) == ([1, 1, 0, 1], 3.0, pytest.approx(1 / 3))
    assert sent(OneBitTwoMeans(), torch.tensor([-2.0, -4.0]))[2].tolist() == [-3, -3]


def test_extremes_are_exact() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        info = torch.finfo(dtype)
        for value in (info.max, info.smallest_normal, info.smallest_normal * info.eps):
            x = torch.tensor([value, -value] * 50, dtype=dtype)
            for stage in (ScaledSign(), OneBitTwoMeans()):
                assert torch.equal(sent(stage, x)[2], x)


def test_threads_do_not_matter(normal: Tensor) -> None:
    threads = torch.get_num_threads()
    try:
        scales = []
        for n in (1, 2):
            torch.set_num_threads(n)
            scales.append([float(v) for s in (ScaledSign(), OneBitTwoMeans()) for v in sent(s, normal)[1].values()])
    finally:
        torch.set_num_threads(threads)
    assert scales[0] == scales[1]


def test_refusals() -> None:
    half = TensorSpec((5,), torch.float16)
    good = torch.tensor(1.0)
    for bad in (torch.tensor(-1e-9), torch.tensor(70_000.0)):
        with pytest.raises(ValueError, match="scale"):
            ScaledSign().encoded_spec(half, {"scale": bad})
        for side in ({"negative": bad, "positive": good}, {"negative": good, "positive": bad}):
            with pytest.raises(ValueError, match="scale"):
                OneBitTwoMeans().encoded_spec(half, side)
    for stage in (ScaledSign(), OneBitTwoMeans()):
        with pytest.raises(ValueError, match=r"takes floating tensors of 16 to 64 bits, not torch\.int64"):
            stage.side_spec(TensorSpec((5,), torch.int64))
