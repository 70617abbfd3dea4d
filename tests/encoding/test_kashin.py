"""Kashin's representation is exact, is a tight frame, has small coefficients, and helps quantisation to few bits."""

import math

import pytest
import torch
from test_rotation import bound
from torch import Tensor

from fedq.encoding import (
    Encoder,
    EncodingStage,
    FixedWidth,
    HadamardRotation,
    KashinRepresentation,
    Key,
    StateDictEncoder,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.testing import KEY, Bound, wave

STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (KashinRepresentation(), bound),
    (KashinRepresentation(2.0, iterations=10, eta=0.7, delta=3.0, block=64, shared=False), bound),
    (KashinRepresentation(1.0, iterations=1, block=16), bound),
]
TUNED = {"iterations": 15, "eta": 0.7, "delta": 3.0}


@pytest.mark.parametrize("stage", [stage for stage, _ in STAGES], ids=str)
def test_decoding_is_a_tight_frame(stage: EncodingStage) -> None:
    """With the vectors of the frame as columns of U, U Uᵀ is the identity, and U times the coefficients is x."""
    for n in (1, 3, 13, 45):
        spec = TensorSpec((n,), torch.float64)
        many = stage.encoded_spec(spec, {}).numel
        frame = torch.stack([stage.decode(unit, {}, spec, KEY) for unit in torch.eye(many, dtype=torch.float64)], 1)
        torch.testing.assert_close(frame @ frame.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
        x = wave(n, dtype=torch.float64)
        torch.testing.assert_close(frame @ stage.encode(x, KEY)[0], x, rtol=0, atol=1e-13)


def test_how_many_coefficients() -> None:
    """The number is redundancy · n, rounded up to whole blocks. A small tensor has one block, a power of two."""
    for redundancy, block, n, expected in (
        (4 / 3, 1024, 1_605_632, 2_091 * 1024),
        (1.5, 64, 1000, 24 * 64),
        (1.5, 1024, 100, 256),
        (1.0, 1024, 1, 1),
        (2.0, 1024, 1, 2),
        (1.0, 1, 5, 5),
        (2.0, 8, 0, 0),
    ):
        stage = KashinRepresentation(redundancy, block=block)
        assert stage.encoded_spec(TensorSpec((n,), torch.float32), {}) == TensorSpec((expected,), torch.float32)
        assert expected >= redundancy * n


def level(stage: KashinRepresentation, x: Tensor) -> float:
    """Returns the largest K of a block: its largest coefficient · √B / ‖block‖."""
    y = stage.encode(x, KEY)[0].view(-1, stage.block)
    norms = (
        KashinRepresentation(stage.redundancy, 1, block=stage.block).encode(x, KEY)[0].view(-1, stage.block).norm(dim=1)
    )
    return float((y.abs().amax(1) * math.sqrt(stage.block) / norms).max())


def test_coefficients_are_small() -> None:
    gauss = torch.from_numpy(Key(3).generator().standard_normal(60_000)).float()
    for redundancy, paper, tuned in ((4 / 3, 3.7, 2.3), (2.0, 3.2, 2.2)):
        plain = level(KashinRepresentation(redundancy, 1), gauss)
        assert level(KashinRepresentation(redundancy), gauss) < min(paper, plain - 0.5)
        assert level(KashinRepresentation(redundancy, **TUNED), gauss) < tuned
    # Lyubarskii & Vershynin guarantee K ≤ 1 / ((1 − eta)·√delta); a spike spreads over its block too
    assert level(KashinRepresentation(2.0, 30, 0.7, 2.0), gauss) < 1 / (0.3 * math.sqrt(2))
    spikes = torch.zeros(51_200)
    spikes[:1000] = wave(1000) * 50
    assert level(KashinRepresentation(2.0, **TUNED), spikes + 1e-3 * gauss[:51_200]) < 2.6


def rate_and_error(stages: list[EncodingStage], x: Tensor) -> tuple[float, float]:
    """Returns the bits an element of a real message, and ‖x̂ − x‖² / ‖x‖²."""
    codec = StateDictEncoder(Encoder(stages, FixedWidth())).bind(schema_of({"x": x}))
    message = codec.encode({"x": x}, KEY).message
    back = codec.decode(message, KEY).tensors["x"]
    return 8 * len(message) / x.numel(), float((back - x).double().square().sum() / x.double().square().sum())


def test_at_equal_bits() -> None:
    """At three bits an element of a spiky tensor, the stage beats the rotation alone, and both beat plain rounding."""
    x = torch.from_numpy(Key(4).generator().standard_normal(131_072)).float()
    x[::1000] *= 50
    plain_bits, plain = rate_and_error([UniformQuantization(3)], x)
    rotated_bits, rotated = rate_and_error([HadamardRotation(1024, 2), UniformQuantization(3)], x)
    kashin_bits, kashin = rate_and_error(
        [HadamardRotation(), KashinRepresentation(1.5, **TUNED), UniformQuantization(2)], x
    )
    alone_bits, alone = rate_and_error([KashinRepresentation(1.5, **TUNED), UniformQuantization(2)], x)
    assert plain_bits == pytest.approx(3, abs=0.01)
    assert rotated_bits == pytest.approx(3, abs=0.01)
    assert kashin_bits == pytest.approx(3, abs=0.03)
    assert alone_bits == kashin_bits
    assert kashin < 0.92 * rotated < 0.1 * plain
    assert alone < 0.1 * plain


def test_a_frames_error_is_divided_by_the_redundancy() -> None:
    x = wave(51_200)
    stage, spec = KashinRepresentation(2.0), TensorSpec.of(x)
    y = stage.encode(x, KEY)[0]
    noise = torch.from_numpy(Key(5).generator().standard_normal(len(y))).float()
    back = stage.decode(y + noise, {}, spec, KEY)
    ratio = float((back - x).square().sum() / noise.square().sum())
    assert ratio == pytest.approx(len(x) / len(y), rel=0.03)


def test_same_bits_on_any_number_of_threads() -> None:
    threads, x = torch.get_num_threads(), wave(300_001)
    try:
        results = []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            results.append(KashinRepresentation().encode(x, KEY)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_never_decoded_to_infinity() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        spec = TensorSpec((2, 3), dtype)
        stage = KashinRepresentation(block=4)
        y = torch.full((stage.encoded_spec(spec, {}).numel,), torch.finfo(work).max, dtype=work)
        assert bool(stage.decode(y, {}, spec, KEY).isfinite().all())


def test_shared_or_each_its_own_and_refusals() -> None:
    x, other = wave(100), KEY._replace(client=4)
    for shared in (True, False):
        stage = KashinRepresentation(shared=shared)
        assert stage.commutes_with_sum == shared
        assert torch.equal(stage.encode(x, KEY)[0], stage.encode(x, other)[0]) == shared
    for name, bad in (
        ("redundancy", (0.9, math.nan, math.inf)),
        ("iterations", (0, -1)),
        ("eta", (0.0, 1.0, math.nan)),
        ("delta", (0.0, -1.0, math.inf)),
        ("block", (0, 3, 1 << 15)),
    ):
        for value in bad:
            with pytest.raises(ValueError, match=f"{name} must be"):
                KashinRepresentation(**{name: value})
    with pytest.raises(ValueError, match="floating"):
        KashinRepresentation().encoded_spec(TensorSpec((3,), torch.int64), {})
