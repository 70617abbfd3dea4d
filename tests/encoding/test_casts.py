"""Compares casts with tables made from the bits, and with numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import Cast, Encoder, EncodingStage, Key, Raw, StateDictEncoder, TensorSpec
from fedq.encoding.testing import Bound, wave

KEY = Key(0)
FORMATS = {  # exponent bits, mantissa bits, largest finite value
    "float16": (5, 10, 65504.0),
    "bfloat16": (8, 7, (2 - 2**-7) * 2.0**127),
    "float8_e4m3fn": (4, 3, 448.0),
    "float8_e5m2": (5, 2, 57344.0),
}


def bound_of(stage: Cast) -> Bound:
    """Returns half a unit of the last place, for normal numbers or denormals, and the part that is clipped."""
    exponent_bits, mantissa, largest = FORMATS[stage.dtype]

    def bound(x: Tensor) -> float:
        peak, info = float(x.double().abs().max()), torch.finfo(x.dtype)
        scale = 2.0 ** (math.frexp(largest)[1] - math.frexp(peak)[1] - 1) if stage.scale and peak > 1e-300 else 1.0
        denormal = 2.0 ** (1 - mantissa - (2 ** (exponent_bits - 1) - 1)) / scale
        own = peak * max(info.eps, 2**-52) + info.smallest_normal * info.eps  # rounding of the tensor's dtype
        clipped = 0.0 if stage.scale else max(0.0, peak - largest)
        return peak * 2.0 ** -(mantissa + 1) * (1 + 1e-6) + denormal / 2 * (1 + 1e-6) + own + clipped

    return bound


STAGES: list[tuple[EncodingStage, Bound | None]] = [
    (stage, bound_of(stage)) for name in FORMATS for stage in (Cast(name), Cast(name, scale=True))
]


def values_of(name: str) -> np.ndarray:
    """Returns the non-negative finite values in order, from the definition of exponent and mantissa.

    The index is the code.
    """
    exponent_bits, mantissa, largest = FORMATS[name]
    code = np.arange(2 ** (exponent_bits + mantissa))
    exponent, fraction, bias = code >> mantissa, code % 2**mantissa, 2 ** (exponent_bits - 1) - 1
    values = np.where(
        exponent == 0,
        np.ldexp(fraction.astype(float), 1 - bias - mantissa),
        np.ldexp(1 + fraction / 2**mantissa, np.minimum(exponent - bias, 1000)),
    )
    return values[values <= largest]


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the code of the nearest value, with the sign bit; of two equally near codes, the even one."""
    magnitude, top = np.minimum(np.abs(x.astype(np.float64)), table[-1]), len(table) - 1
    above = np.clip(np.searchsorted(table, magnitude), 1, top)
    below = above - 1
    up, down = table[above] - magnitude, magnitude - table[below]
    return np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_even_saturating(name: str) -> None:
    exponent_bits, mantissa, largest = FORMATS[name]
    table = values_of(name)
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)  # every tie, and the numbers next to each tie
    random = np.ldexp(Key(1).generator().normal(size=20_000), Key(2).generator().integers(-30, 30, 20_000))
    x = np.concatenate([table, middles, np.nextafter(middles, 0), np.nextafter(middles, 9), random.clip(-3e38, 3e38)])
    x = np.concatenate([x, -x, [min(largest * 1.01, 3.4e38), -3e38, 3.4e38]]).astype(np.float32)
    stage, given = Cast(name), torch.from_numpy(x)
    y, _ = stage.encode(given, KEY)
    codes = y.view(torch.uint8).numpy().view(np.uint8 if y.dtype == torch.uint8 else np.uint16)
    expected, sign = nearest(x, table), np.signbit(x)
    assert np.array_equal(codes, expected + sign * 2 ** (exponent_bits + mantissa))
    back = stage.decode(y, {}, TensorSpec.of(given), KEY).numpy()
    assert np.array_equal(back, np.where(sign, -table[expected], table[expected]).astype(np.float32))
    half = given.half().clamp(-65504, 65504)
    assert torch.equal(stage.encode(half, KEY)[0], stage.encode(half.float(), KEY)[0])


def test_float16_as_numpy() -> None:
    x = (Key(3).generator().normal(size=100_000) * 10.0 ** np.linspace(-9, 4, 100_000)).astype(np.float32)
    y, _ = Cast("float16").encode(torch.from_numpy(x), KEY)
    assert np.array_equal(y.numpy(), x.astype(np.float16))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_all_codes(name: str) -> None:
    table, stage, codes = values_of(name), Cast(name), torch.arange(256).to(torch.uint8)
    assert len(table) == {"float8_e4m3fn": 127, "float8_e5m2": 124}[name]
    spec = TensorSpec((1,), torch.float64)
    for code in range(256):
        if code % 128 < len(table):
            value = float(stage.decode(codes[code : code + 1], {}, spec, KEY))
            assert value == table[code % 128] * (-1 if code > 127 else 1)
        else:  # NaN, and e5m2's infinity
            with pytest.raises(ValueError, match="NaN or infinity"):
                stage.decode(codes[code : code + 1], {}, spec, KEY)


@pytest.mark.parametrize("name", FORMATS)
def test_the_scale_is_the_largest_that_clips_nothing(name: str) -> None:
    largest, stage = FORMATS[name][2], Cast(name, scale=True)
    for dtype, peaks in {
        torch.float32: (1e-45, 1e-40, 0.3, 1.0, 1.75, 1.8, 1.99, 448.0, 449.0, 3e38, torch.finfo(torch.float32).max),
        torch.float64: (5e-324, 1e-310, 1.0, 1.76, 1e308, torch.finfo(torch.float64).max),
    }.items():
        for peak in peaks:
            x = (wave(50, dtype=torch.float64) * 0.999).mul(peak).to(dtype)
            x[7] = -peak
            peak = float(x[7].abs())
            y, side = stage.encode(x, KEY)
            scaled = (
                math.ldexp(peak / 2**60, int(side["exponent"]) + 60)
                if peak > 1
                else math.ldexp(peak, int(side["exponent"]))
            )
            assert largest / 2 < scaled <= largest
            # values of the format, times the power of two, are decoded exactly
            again = stage.decode(y, side, TensorSpec.of(x), KEY)
            twice, same = stage.encode(again, KEY)
            assert torch.equal(stage.decode(twice, same, TensorSpec.of(x), KEY), again)
    y, side = stage.encode(torch.zeros(4), KEY)
    assert int(side["exponent"]) == 0


def test_float8_with_scale_on_small_weights() -> None:
    # without the scale all elements are denormals of e4m3
    x = torch.from_numpy(Key(4).generator().normal(size=100_000) * 1e-4)
    error = {}
    for scale in (False, True):
        stage = Cast("float8_e4m3fn", scale)
        y, side = stage.encode(x, KEY)
        error[scale] = float((stage.decode(y, side, TensorSpec.of(x), KEY) - x).square().sum() / x.square().sum())
    assert error[False] == 1
    # relative errors are uniform in ±2^-4 / m for a mantissa m from 1 to 2: mean squares from 2^-8 / 12 to 2^-8 / 3
    assert 2**-8 / 3 / 4 < error[True] < 2**-8 / 3


@pytest.mark.parametrize(("name", "bytes_each"), [("float16", 2), ("bfloat16", 2), ("float8_e4m3fn", 1)])
def test_length(name: str, bytes_each: int) -> None:
    for stage, side in ((Cast(name), 0), (Cast(name, scale=True), 2)):
        codec = StateDictEncoder(Encoder([stage], Raw()), threshold=0).bind({"x": TensorSpec((1001,), torch.float32)})
        assert len(codec.encode({"x": wave(1001)}, KEY).message) == 48 + side + 1001 * bytes_each


def test_refusals() -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        Cast("float32")
    with pytest.raises(ValueError, match="Cast takes floating"):
        Cast().side_spec(TensorSpec((3,), torch.int64))
    for exponent in (-1025, 1204, 2**15 - 1, -(2**15)):
        with pytest.raises(ValueError, match="exponent"):
            Cast(scale=True).encoded_spec(
                TensorSpec((3,), torch.float32), {"exponent": torch.tensor(exponent, dtype=torch.int16)}
            )
    for code in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="NaN or infinity"):
            Cast().decode(torch.tensor([1.0, code], dtype=torch.float16), {}, TensorSpec((2,), torch.float32), KEY)
