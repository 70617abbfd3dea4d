"""Compares CABAC with entropies and ideal code lengths; then tests extreme symbols and hostile words."""

import inspect
import math
import random
import struct
import time
import tracemalloc

import hypothesis.extra.numpy as arrays
import numba
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedq.encoding import CABAC, TensorSpec, compiled
from fedq.encoding.coders import Coder, ans_loops, cabac_loops, huffman_loops, tokens_loops
from fedq.encoding.stages import step_loops, trellis_loops

CODERS: list[tuple[Coder, int | None]] = [(CABAC(), levels) for levels in (None, 1, 2, 3, 16, 100, 256)]
WIDE_CODERS: list[tuple[Coder, int | None]] = [(CABAC(), levels) for levels in (257, 4097, 65_536, 2**31)]
EDGES = (0, 1, -1, 15, 16, 17, -16, 1023, 2**30, -(2**30), 2**31 - 1, -(2**31))
ANY = TensorSpec((1,), torch.int32)


def bits(values: np.ndarray, levels: int | None = None) -> int:
    """Returns the length of the coded values in bits, and checks that they are decoded exactly."""
    x = torch.from_numpy(values)
    spec = TensorSpec(tuple(x.shape), x.dtype, levels)
    data = CABAC().encode(x, spec)
    assert torch.equal(CABAC().decode(memoryview(data), spec), x)
    return 8 * len(memoryview(data))


def with_signs(magnitudes: np.ndarray) -> np.ndarray:
    return (magnitudes * np.random.default_rng(1).choice([-1, 1], magnitudes.shape)).astype(np.int32)


def geometric_bits(magnitudes: np.ndarray, mean: np.ndarray | float) -> float:
    """Returns the ideal length: −log₂ of the probability of all magnitudes, and one bit for each sign of a nonzero."""
    return float((np.log2(1 + mean) + magnitudes * np.log2(1 + 1 / mean) + (magnitudes > 0)).sum())


@pytest.mark.parametrize("mean", [0.05, 0.2, 1.0, 5.0, 30.0, 300.0, 10_000.0])
@pytest.mark.parametrize("shape", [(1000, 1000), (1_000_000,), (100_000, 10)])
def test_geometric_sources_cost_their_entropy(mean: float, shape: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(2).geometric(1 / (1 + mean), shape) - 1
    assert 0.99 < bits(with_signs(drawn)) / geometric_bits(drawn, mean) < 1.01


@pytest.mark.parametrize("sigma", [0.2, 0.3, 0.5, 1.0, 3.0, 20.0])
def test_normal_sources_cost_their_entropy(sigma: float) -> None:
    drawn = np.rint(np.random.default_rng(3).normal(0, sigma, (1000, 1000))).astype(np.int32)
    k = np.arange(-400, 401)
    shares = np.diff(scipy.stats.norm.cdf(np.append(k - 0.5, 400.5) / sigma))
    least = float(scipy.stats.entropy(shares, base=2)) * drawn.size
    # the probabilities never stop moving, which costs some thousandths of a bit a symbol: much at low rates
    assert bits(drawn) / least > 0.98 and bits(drawn) < 1.005 * least + 0.002 * drawn.size


@pytest.mark.parametrize(("mean", "most"), [(0.02, 1.15), (0.1, 1.08), (1.0, 1.07)])
def test_scales_of_rows_and_columns_are_found(mean: float, most: float) -> None:
    draw = np.random.default_rng(4)
    means = np.exp(2.5 * draw.normal(size=(1000, 1))) * np.exp(2.5 * draw.normal(size=(1, 1000)))
    means *= mean / means.mean()
    drawn = draw.geometric(1 / (1 + means)) - 1
    values = with_signs(drawn)
    ideal, found = geometric_bits(drawn, means), bits(values)
    zeroth = float(scipy.stats.entropy(np.unique(values, return_counts=True)[1], base=2)) * values.size
    assert 0.99 < found / ideal < most
    assert found < 0.7 * zeroth


def test_rows_and_columns_of_zeros_cost_next_to_nothing() -> None:
    draw = np.random.default_rng(5)
    part = np.rint(draw.normal(0, 1, (200, 300))).astype(np.int32)
    rows = np.zeros((1000, 300), np.int32)
    rows[draw.permutation(1000)[:200]] = part
    chosen = math.log2(math.comb(1000, 200))
    assert bits(rows) - bits(part) < 1.02 * chosen + 50
    columns = np.zeros((200, 1500), np.int32)
    columns[:, draw.permutation(1500)[:300]] = part
    assert bits(columns) - bits(part) < 0.08 * bits(part) + math.log2(math.comb(1500, 300))
    assert bits(np.zeros((5000, 3000), np.int32)) == bits(np.zeros(10**6, np.uint8)) == 0
    assert bits(np.full((100, 100), 7, np.uint8), 15) == 0  # 7 is the middle of 15 levels
    assert bits(np.eye(1, 10**6, 777, dtype=np.int32)) < 250


@given(
    st.one_of(
        arrays.arrays(
            st.sampled_from([np.int32, np.int64, np.int8, np.uint8, np.int16]),
            arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=140),
            elements=st.integers(0, 127),
        ),
        arrays.arrays(
            np.int32,
            st.tuples(st.integers(0, 9), st.sampled_from([1, 7, 127, 128, 129])),
            elements=st.integers(-(2**31), 2**31 - 1),
        ),
        arrays.arrays(np.int64, st.integers(0, 40), elements=st.sampled_from(EDGES)),
    )
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_round_trips(values: np.ndarray) -> None:
    bits(values)
    if values.size and values.min() >= 0:
        for levels in (int(values.max()) + 1, int(values.max()) + 100, 2**31):
            bits(values, levels)


def test_one_symbol_takes_more_than_four_words() -> None:
    # an earlier version reserved four words a symbol
    for value in EDGES:
        for shape in ((), (1,), (1, 1), (2,), (3, 200)):
            bits(np.full(shape, value, np.int32))
    rare = np.zeros((400, 400), np.int32)
    rare[-1, -1] = -(2**31)
    assert 16 * 12 < bits(rare) < 2000
    for step in (1, 2, 3, 50):  # scales that jump by 2^31 from one symbol to the next
        jumps = np.zeros(3000, np.int32)
        jumps[::step] = -(2**31)
        bits(jumps)
        bits(jumps.reshape(10, 300))
        bits(jumps.reshape(300, 10))


def test_symbols_out_of_range_are_refused() -> None:
    for wrong, levels in ((5, 5), (-1, 5), (2**31, None), (-(2**31) - 1, None), (2**31, 2**40)):
        with pytest.raises(ValueError, match="symbol"):
            CABAC().encode(torch.tensor([0, wrong]), TensorSpec((2,), torch.int64, levels))
    with pytest.raises(ValueError, match="integers"):
        CABAC().encode(torch.zeros(1), TensorSpec((1,), torch.float32))


def test_words_have_one_meaning_and_symbols_one_code() -> None:
    draw, accepted, refused = random.Random(6), 0, 0
    specs = [
        TensorSpec((3, 5), torch.int32),
        TensorSpec((9, 130), torch.int32),
        TensorSpec((40,), torch.uint8, 5),
        TensorSpec((2, 3, 4), torch.int64, 2**40),
        TensorSpec((1,), torch.int8),
        TensorSpec((), torch.bool),
    ]
    for i in range(6000):
        spec = specs[i % len(specs)]
        words = [draw.choice((0, 1, 0xFFFF, 0x7FFF, 0x8000, draw.randrange(65_536))) for _ in range(draw.randrange(30))]
        words = [0xFFFF] * draw.choice((0, 0, 2, 3, 4)) + words[: draw.choice((2, 5, 30))]
        data = struct.pack(f"<{len(words)}H", *words)
        try:
            back = CABAC().decode(memoryview(data), spec)
        except ValueError:
            refused += 1
            continue
        assert back.shape == spec.shape and back.dtype == spec.dtype
        assert bytes(CABAC().encode(back, spec)) == data
        accepted += 1
    assert accepted > 100 and refused > 300


@pytest.mark.parametrize("shape", [(60,), (6, 10), (4, 130)])
def test_cuts_rests_and_flips_are_refused_or_other_symbols(shape: tuple[int, ...]) -> None:
    x = torch.from_numpy(np.rint(np.random.default_rng(7).normal(0, 2, shape))).int()
    spec = TensorSpec.of(x)
    data = bytes(CABAC().encode(x, spec))
    for wrong in (data + b"\0", data + b"\0\0", data[:-1], data + data, data + bytes(100), data + b"\1" * 100):
        with pytest.raises(ValueError):
            CABAC().decode(memoryview(wrong), spec)
    others = [data[:i] for i in range(0, len(data), 2)] + [data + b"\1\0", data[2:]]
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        others.append(bytes(flipped))
    refused = 0
    for wrong in others:
        try:
            assert bytes(CABAC().encode(CABAC().decode(memoryview(wrong), spec), spec)) == wrong
        except ValueError:
            refused += 1
    assert refused > len(others) // 2
    for empty in ((0,), (3, 0), (0, 200)):
        assert CABAC().decode(memoryview(b""), TensorSpec(empty, torch.int32)).shape == empty
        with pytest.raises(ValueError, match="end"):
            CABAC().decode(memoryview(data), TensorSpec(empty, torch.int32))


def test_beyond_every_interval() -> None:
    # the first interval ends before 0xFFFF 0xFFFF 0xFFFF: no symbols have a larger number
    for tail in (b"", b"\1\0", b"\xff" * 40):
        for shape in ((1,), (1000,), (20, 200)):
            with pytest.raises(ValueError, match="end"):
                CABAC().decode(memoryview(b"\xff" * 6 + tail), TensorSpec(shape, torch.int32))
    # a decoder that counts modulo 2^64 accepts these words, but the encoder writes other words for the symbols
    data = struct.pack("<8H", *[0xFFFF] * 4, 50_666, 45_002, 55_170, 24_646)
    with pytest.raises(ValueError, match="end"):
        CABAC().decode(memoryview(data), TensorSpec((12,), torch.int32))


def test_a_flag_that_lies_is_refused() -> None:
    # the flag says that the row has a symbol other than 0, but all symbols of the row are 0
    chance = int(cabac_loops.cabac_model()[0][-1, 0]) >> 16
    low, span, at = np.uint64(0), np.uint64(2**48 - 1), 0
    out = np.zeros(99, np.uint16)
    low, span, at = cabac_loops._put(low, span, True, chance, out, at)
    word = int(low >> np.uint64(32)) + 1  # zeros have the lower parts of intervals: all following symbols are 0
    spec = TensorSpec((1, 128), torch.int32)
    with pytest.raises(ValueError, match="end"):
        CABAC().decode(memoryview(struct.pack("<H", word)), spec)


def test_hostile_words_take_no_more_time_or_memory_than_the_tensor() -> None:
    spec, draw = TensorSpec((1000, 1000), torch.int32), random.Random(8)
    CABAC().decode(memoryview(b""), ANY)
    for data in (bytes(2), b"\xff" * 10**6, draw.randbytes(10**6), b"\0" * 10**6, b"\xfe\xff" * 10**5):
        tracemalloc.start()
        try:
            began = time.thread_time()
            with pytest.raises(ValueError):
                CABAC().decode(memoryview(data), spec)
            assert time.thread_time() - began < 2
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * 4 * spec.numel


def test_arithmetic_is_the_same_everywhere() -> None:
    # classes follow from float64: no compiler may contract or reorder the operations
    modules = (ans_loops, cabac_loops, huffman_loops, tokens_loops, step_loops, trellis_loops)
    assert "fastmath" not in "".join(map(inspect.getsource, (compiled, *modules)))
    loops = [value for module in modules for value in vars(module).values() if hasattr(value, "targetoptions")]
    assert len(loops) > 20 and not any(value.targetoptions.get("fastmath") for value in loops)
    fresh = numba.njit(lambda a, b, c: (a + 2 * b) * c * ((a + 4 * b) / (c + 4.0)))
    assert fresh(1.0, 2.0, 3.0) == 5.0 * 3.0 * (9.0 / 7.0)
    code = "".join(fresh.inspect_llvm().values())
    assert not any(word in code for word in (" fast ", " contract ", " reassoc ", "llvm.fma", "llvm.fmuladd"))


def test_a_mask_needs_no_signs() -> None:
    mask = (torch.rand(100, 100, generator=torch.Generator().manual_seed(1)) < 0.2).byte()
    spec = TensorSpec((100, 100), torch.uint8, 2)
    signed, plain = (CABAC(signed).encode(mask, spec) for signed in (True, False))
    assert len(signed) - len(plain) == pytest.approx(int(mask.sum()) / 8, abs=4)
    assert torch.equal(CABAC(False).decode(memoryview(plain), spec), mask)


def test_other_layouts_are_the_same_symbols() -> None:
    x = torch.from_numpy(np.rint(np.random.default_rng(9).normal(0, 2, (6, 5, 4, 3)))).int()
    spec, data = TensorSpec.of(x), bytes(CABAC().encode(x, TensorSpec.of(x)))
    assert bytes(CABAC().encode(x.to(memory_format=torch.channels_last), spec)) == data
    assert bytes(CABAC().encode(x.reshape(6, 60), TensorSpec((6, 60), torch.int32))) == data
    assert bytes(CABAC().encode(x[0, 0].t(), TensorSpec((3, 4), torch.int32))) == bytes(
        CABAC().encode(x[0, 0].t().contiguous(), TensorSpec((3, 4), torch.int32))
    )


def some(tensor: Tensor) -> bytes:
    return bytes(CABAC().encode(tensor, TensorSpec.of(tensor)))


def test_the_first_axis_is_that_of_rows() -> None:
    scales = torch.tensor([0.1, 50.0]).repeat(100)
    x = (torch.randn(200, 9, generator=torch.Generator().manual_seed(1)) * scales[:, None]).round().int()
    assert len(some(x)) < len(some(x.reshape(-1)))
