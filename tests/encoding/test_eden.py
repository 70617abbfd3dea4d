"""Compares the errors of DRIVE and EDEN with closed forms, after uniformly random rotations and Hadamard's."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import Eden, Encoder, EncodingStage, FixedWidth, HadamardRotation, Key, RandomMask, TensorSpec
from fedq.encoding.message import Reader
from fedq.encoding.stages.levels import normal_levels
from fedq.encoding.testing import Bound, wave

KEY = Key(3)
STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (Eden(), None),
    (Eden(1, 100, "least_squares"), None),
    (Eden(4, 16_384), None),
    (Eden(8, 7), None),
]
DISTORTION = {1: 1 - 2 / math.pi, 2: 0.1175, 3: 0.03454, 4: 0.009501}  # of LloydMax


def chain(*stages: EncodingStage) -> Encoder:
    return Encoder(stages, FixedWidth())


def sent(encoder: Encoder, x: Tensor, key: Key) -> Tensor:
    codec = encoder.bind(TensorSpec.of(x))
    payload = b"".join(codec.encode(x, key, {})[0])
    return codec.decode(Reader(memoryview(payload)), key, {}, torch.device("cpu"), False)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", ["unbiased", "least_squares"])
def test_error_of_a_normal_tensor(bits: int, scale: str) -> None:
    x = torch.from_numpy(np.random.default_rng(5).standard_normal(500_000)).float()
    d = DISTORTION[bits]
    expected = 1 / (1 - d) - 1 if scale == "unbiased" else d
    if bits == 1:
        assert expected == pytest.approx(math.pi / 2 - 1 if scale == "unbiased" else 1 - 2 / math.pi)
    for block, within in ((10_000, 0.01), (64, 0.07))[: 2 if bits < 3 else 1]:
        back = sent(chain(Eden(bits, block, scale)), x, KEY)
        assert float((back - x).double().square().sum() / x.double().square().sum()) == pytest.approx(
            expected, rel=within
        )


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scales_are_the_papers(bits: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    for n, block in ((1000, 100), (1037, 100), (50, 100), (40_000, 16_384)):
        x = torch.from_numpy(rng.standard_normal(n) * np.repeat([1e-2, 1, 30, 0], -(-n // 4))[:n]).to(dtype)
        for scale in ("unbiased", "least_squares"):
            stage = Eden(bits, block, scale)
            y, side = stage.encode(x, KEY)
            back = stage.decode(y, side, TensorSpec.of(x), KEY)
            for i, z in enumerate(np.split(x.double().numpy(), range(block, n, block))):
                if not z.any():
                    assert float(side["scales"][i]) == 0 and not back[i * block : (i + 1) * block].any()
                    continue
                levels = normal_levels(bits).numpy()
                q = levels[np.abs(z[:, None] / np.sqrt((z**2).mean()) - levels).argmin(1)]
                s = (z @ z) / (z @ q) if scale == "unbiased" else (z @ q) / (q @ q)
                assert float(side["scales"][i]) == pytest.approx(s * levels[-1], rel=1e-5)
                own = back[i * block : (i + 1) * block].double().numpy()
                np.testing.assert_allclose(own, s * q, rtol=2e-3 if dtype == torch.float16 else 1e-5)
                if scale == "unbiased" and dtype != torch.float16:
                    assert own @ z == pytest.approx(z @ z, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2])
def test_unbiased_behind_a_uniform_rotation(bits: int) -> None:
    d, clients = 128, 10
    x = wave(d).double() ** 3 + 0.2
    rotations = np.linalg.qr(np.random.default_rng(7).standard_normal((400, d, d)))[0]
    # random signs make the rotations uniform (Haar)
    rotations = rotations * np.random.default_rng(8).choice([-1.0, 1.0], (400, 1, d))
    stage, estimates = Eden(bits), []
    for rotation in rotations:
        z = torch.from_numpy(rotation) @ x
        y, side = stage.encode(z, KEY)
        estimates.append(torch.from_numpy(rotation).T @ stage.decode(y, side, TensorSpec.of(z), KEY))
    e = torch.stack(estimates)
    standard = e.std(0) / math.sqrt(len(e))
    assert bool(((e.mean(0) - x).abs() <= 4.5 * standard).all())
    one = float((e - x).square().sum(1).mean() / x.square().sum())
    many = float((e.view(-1, clients, d).mean(1) - x).square().sum(1).mean() / x.square().sum())
    assert one == pytest.approx(1 / (1 - DISTORTION[bits]) - 1, rel=0.03)
    assert many == pytest.approx(one / clients, rel=0.05)


@pytest.mark.parametrize(("fraction", "bits"), [(None, 1), (None, 2), (0.5, 1), (0.25, 2)])
def test_error_of_the_mean_behind_hadamard(fraction: float | None, bits: int) -> None:
    n, clients = 1 << 14, 10
    x = torch.zeros(n)
    x[::37] = wave(len(x[::37])) + 0.5  # far from normal, and the same for all clients
    mask = [] if fraction is None else [RandomMask(fraction)]
    encoder = chain(HadamardRotation(4096, shared=False), *mask, Eden(bits, 1024))
    back = torch.stack([sent(encoder, x, KEY._replace(client=c)) for c in range(40)]).double()
    # for a rotated z, E‖S·Q‖² = ‖z‖² / (1 − D); a mask with the scale 1/p multiplies this by 1/p
    expected = 1 / (1 - DISTORTION[bits]) / (fraction or 1) - 1
    one = float((back - x).square().sum(1).mean() / x.square().sum())
    many = float((back.view(-1, clients, n).mean(1) - x).square().sum(1).mean() / x.square().sum())
    assert one == pytest.approx(expected, rel=0.03)
    assert many == pytest.approx(expected / clients, rel=0.06)


def test_extremes_and_threads() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        info = torch.finfo(dtype)
        for value in (info.max, info.smallest_normal * info.eps):
            x = torch.tensor([value, -value] * 50, dtype=dtype)
            y, side = Eden().encode(x, KEY)
            back = Eden().decode(y, side, TensorSpec.of(x), KEY).double() / x.double()
            assert float((back - 1).abs().max()) <= (3 * info.eps if value == info.max else 0.6)
    x, threads, found = wave(300_000), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y, side = Eden(3, 16_384).encode(x, KEY)
            found.append((y.tolist(), side["scales"].tolist()))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"takes floating tensors of 16 to 64 bits, not torch\.int64"):
        Eden().side_spec(TensorSpec((5,), torch.int64))
    for bad in (-1e-9, 70_000.0):
        with pytest.raises(ValueError, match="scale"):
            Eden().encoded_spec(TensorSpec((2000,), torch.float16), {"scales": torch.tensor([1.0, bad])})
    for make in (lambda: Eden(0), lambda: Eden(9), lambda: Eden(1, 0), lambda: Eden(1, 16_385)):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(ValueError, match="scale must be"):
        Eden(1, 64, "none")
