"""Rotations are orthogonal, spread large elements, and give uniform quantisation the error of the formula."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor

from fedq.encoding import (
    CosineRotation,
    Encoder,
    EncodingStage,
    FixedWidth,
    HadamardRotation,
    Key,
    StateDictEncoder,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.stages.random_numbers import random_signs
from fedq.encoding.testing import KEY, Bound, wave


def bound(x: Tensor) -> float:
    """Returns a few eps of the norm for each product of matrices, and the rounding of the dtype of x."""
    info, work = torch.finfo(x.dtype), torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32)
    largest = float(x.abs().max())
    norm = largest * float(torch.linalg.vector_norm(x.double() / largest)) if largest else 0.0
    rounding = info.eps * largest if info.bits == 16 else 0.0
    return 32 * work.eps * norm + rounding + 3000 * work.smallest_normal * work.eps + info.smallest_normal * info.eps


STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (HadamardRotation(), bound),
    (HadamardRotation(64, 2, False), bound),
    (HadamardRotation(1), bound),
    (CosineRotation(), bound),
    (CosineRotation(7, 3, False), bound),
]
SMALL = [*(stage for stage, _ in STAGES), HadamardRotation(8), HadamardRotation(16, 2), CosineRotation(None)]


def matrix(stage: EncodingStage, n: int, key: Key = KEY) -> Tensor:
    """Returns the matrix of a rotation of n elements: row i is the rotated i-th unit vector."""
    return torch.stack([stage.encode(unit, key)[0] for unit in torch.eye(n, dtype=torch.float64)])


@pytest.mark.parametrize("stage", SMALL, ids=str)
def test_orthogonal_whatever_the_length(stage: EncodingStage) -> None:
    every = stage in (HadamardRotation(8), CosineRotation(7, 3, False))
    for n in range(1, 41) if every else (1, 2, 3, 5, 17, 31, 65):
        rotation, x = matrix(stage, n), wave(n, dtype=torch.float64)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(stage.decode(x, {}, TensorSpec.of(x), KEY), rotation @ x, rtol=0, atol=1e-13)
        assert stage.encoded_spec(TensorSpec((n, 1), torch.float16), {}) == TensorSpec((n,), torch.float32)


def test_against_explicit_matrices() -> None:
    """For 11 elements in blocks of 8, signs and a Hadamard matrix act on the first 8, then on the last 8."""
    for stage, transform in (
        (HadamardRotation(8), scipy.linalg.hadamard(8) / math.sqrt(8)),
        (CosineRotation(8), scipy.fft.dct(np.eye(8), norm="ortho", axis=0)),
    ):
        signs = random_signs(16, KEY.shared().fold("0"), torch.device("cpu")).numpy().astype(float)
        first, last = np.eye(11), np.eye(11)
        first[:8, :8] = transform @ np.diag(signs[:8])
        last[3:, 3:] = transform @ np.diag(signs[8:])
        x = wave(11, dtype=torch.float64)
        np.testing.assert_allclose(stage.encode(x, KEY)[0].numpy(), last @ first @ x.numpy(), rtol=0, atol=1e-14)
    # between two rounds, element j of block i goes to place i of block j
    rotation = np.kron(np.eye(4), scipy.linalg.hadamard(4) / 2)
    one, two = (random_signs(16, KEY.shared().fold(str(i)), torch.device("cpu")).numpy().astype(float) for i in (0, 1))
    x = wave(16, dtype=torch.float64)
    expected = rotation @ (two * (rotation @ (one * x.numpy())).reshape(4, 4).T.reshape(-1))
    np.testing.assert_allclose(HadamardRotation(4, 2).encode(x, KEY)[0].numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 97, 1000, 4096, 5003])
def test_cosine_is_the_dct(n: int) -> None:
    x = wave(n, dtype=torch.float64)
    signs = random_signs(n, KEY.shared().fold("0"), torch.device("cpu")).double()
    expected = scipy.fft.dct((x * signs).numpy(), norm="ortho")
    np.testing.assert_allclose(CosineRotation(None).encode(x, KEY)[0].numpy(), expected, rtol=0, atol=1e-12)
    single = CosineRotation(None).encode(x.float(), KEY)[0].double().numpy()
    np.testing.assert_allclose(single, expected, rtol=0, atol=4 * 2**-23 * float(x.norm()))


def test_a_spike_becomes_flat() -> None:
    n = 5 * 1024
    for place in (0, 1500, n - 1):
        x = torch.zeros(n)
        x[place] = -3.0
        y = HadamardRotation().encode(x, KEY)[0]
        own = slice(place // 1024 * 1024, place // 1024 * 1024 + 1024)
        torch.testing.assert_close(y[own].abs(), torch.full((1024,), 3 / 32), rtol=3e-7, atol=0)  # flat in the block
        assert float(y.abs().sum()) == float(y[own].abs().sum()), "and nowhere else"
        cosine = CosineRotation(512).encode(x, KEY)[0]
        assert 0.9 * 3 * math.sqrt(2 / 512) < float(cosine.abs().max()) <= 3 * math.sqrt(2 / 512) * 1.000001
    x = torch.zeros(64 * 64)
    x[77] = 1.0  # two rounds in blocks of 64 spread one element over all elements evenly
    torch.testing.assert_close(HadamardRotation(64, 2).encode(x, KEY)[0].abs(), torch.full((4096,), 1 / 64))
    x = torch.zeros(1025)
    x[5] = 1.0  # the second block shares 1023 elements with the first: fresh signs keep them spread
    assert float(HadamardRotation().encode(x, KEY)[0].abs().max()) < 6 / 32


def test_signs_are_the_raw_stream() -> None:
    signs = random_signs(24, Key(1).fold("0"), torch.device("cpu"))
    bits = [int(byte) >> i & 1 for byte in Key(1).fold("0").bits(3, 8) for i in range(8)]
    assert signs.tolist() == [1 - 2 * bit for bit in bits]
    assert "".join("+-"[int(sign < 0)] for sign in signs) == SIGNS_OF_KEY_1
    assert abs(int(random_signs(1_000_000, KEY, torch.device("cpu")).sum())) < 4000


SIGNS_OF_KEY_1 = "---+-++++----++---+----+"


@pytest.mark.parametrize("stage", [HadamardRotation(1024, 2), CosineRotation()], ids=str)
def test_same_bits_on_any_number_of_threads(stage: EncodingStage) -> None:
    threads, x = torch.get_num_threads(), wave(300_001)
    try:
        results = []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            results.append(stage.encode(x, KEY)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_shared_or_each_its_own() -> None:
    x, other = wave(100), KEY._replace(client=4)
    for stage in (HadamardRotation, CosineRotation):
        assert stage(shared=True).commutes_with_sum
        assert not stage(shared=False).commutes_with_sum
        assert torch.equal(stage(shared=True).encode(x, KEY)[0], stage(shared=True).encode(x, other)[0])
        assert not torch.equal(stage(shared=False).encode(x, KEY)[0], stage(shared=False).encode(x, other)[0])
        assert not torch.equal(stage().encode(x, KEY)[0], stage().encode(x, KEY._replace(round=8))[0])


def nmse(encoder: Encoder, x: Tensor) -> float:
    """Returns ‖x̂ − x‖² / ‖x‖²."""
    codec = StateDictEncoder(encoder, threshold=0).bind(schema_of({"x": x}))
    back = codec.decode(codec.encode({"x": x}, KEY).message, KEY).tensors["x"]
    return float((back - x).double().square().sum() / x.double().square().sum())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_error_of_quantisation_behind_it(bits: int) -> None:
    """A rotated tensor of spikes and noise is Gaussian, so its range and the error of stochastic rounding are known."""
    n = 2**17
    x = torch.from_numpy(Key(2).generator().standard_normal(n)).float()
    x[::1000] *= 100
    sigma = float(x.norm()) / math.sqrt(n)
    rotated = HadamardRotation(1024, 2).encode(x, KEY.fold("x").fold("0"))[0] / sigma
    assert abs(float(rotated.pow(4).mean()) - 3) < 0.1, "the fourth moment of a Gaussian"
    # the error is E[p(1 − p)] step², where p is the fraction of a Gaussian value
    span = float(rotated.max() - rotated.min())
    assert abs(span / 2 - math.sqrt(2 * math.log(n))) < 0.6
    step = span / (2**bits - 1)
    fraction = ((rotated - rotated.min()).double() / step) % 1
    expected = float((fraction * (1 - fraction)).mean()) * step**2
    with_rotation = nmse(Encoder([HadamardRotation(1024, 2), UniformQuantization(bits)], FixedWidth()), x)
    assert with_rotation == pytest.approx(expected, rel=0.02)
    # Suresh 2017, theorem 3, for one client: (2 ln d + 2) / (k − 1)²
    assert with_rotation <= (2 * math.log(n) + 2) / (2**bits - 1) ** 2
    assert nmse(Encoder([UniformQuantization(bits)], FixedWidth()), x) > 10 * with_rotation


def test_nothing_is_padded() -> None:
    x = wave(3136, 512)
    encoder = StateDictEncoder(Encoder([HadamardRotation(), UniformQuantization(8)], FixedWidth()), threshold=0)
    assert 4 * x.numel() / len(encoder.bind(schema_of({"x": x})).encode({"x": x}, KEY).message) >= 3.95
    for n in (1, 1023, 1025, 5000):
        small = {"x": wave(n)}
        assert len(encoder.bind(schema_of(small)).encode(small, KEY).message) == 48 + 8 + n


def test_too_large_a_norm_is_refused_and_never_decoded_to_infinity() -> None:
    limit = torch.finfo(torch.float32).max
    for stage in (HadamardRotation(4), CosineRotation(4), HadamardRotation(2, 2)):
        with pytest.raises(ValueError, match=f"{type(stage).__name__} makes encoded NaN or infinite"):
            x = torch.tensor([limit, limit, limit, limit])
            Encoder([stage]).bind(TensorSpec.of(x)).encode(x, KEY, {})
        for dtype in (torch.float16, torch.float32, torch.float64):
            work = torch.float64 if dtype == torch.float64 else torch.float32
            top, spec = torch.finfo(work).max, TensorSpec((2, 2), dtype)
            for y in (torch.tensor([top, -top, top, top], dtype=work), torch.full((4,), top, dtype=work)):
                back = stage.decode(y, {}, spec, KEY)
                assert bool(back.isfinite().all())
                assert float(back.abs().max()) >= 0.99 * torch.finfo(dtype).max, "cut off, not lost"
        below = torch.tensor([limit / 4, -limit / 4, limit / 4, 0.0])
        spec, y = TensorSpec.of(below), stage.encode(below, KEY)[0]
        torch.testing.assert_close(stage.decode(y, {}, spec, KEY), below, rtol=0, atol=bound(below))
    back = HadamardRotation(4).decode(torch.tensor([1e6, 0.0, 0.0, 0.0]), {}, TensorSpec((4,), torch.float16), KEY)
    assert back.abs().tolist() == [65_504.0] * 4, "cut off at the narrower dtype's limit"


def test_refusals() -> None:
    for block in (0, -1, 3, 1000):
        with pytest.raises(ValueError, match="block must be"):
            HadamardRotation(block)
    for stage in (HadamardRotation, CosineRotation):
        with pytest.raises(ValueError, match="repeats must be"):
            stage(repeats=0)
        with pytest.raises(ValueError, match="floating"):
            stage().encoded_spec(TensorSpec((3,), torch.int64), {})
    with pytest.raises(ValueError, match="block must be"):
        CosineRotation(0)
