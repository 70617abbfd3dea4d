"""The coders of integers, masks and runs have the lengths of their formulas, and refuse bytes that they never write."""

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from torch import Tensor

from fedq.encoding import Coder, Elias, Golomb, SparseMask, TensorSpec, ZeroRuns

CODERS: list[tuple[Coder, int | None]] = [
    *((coder, levels) for coder in (Golomb(), Elias("gamma"), Elias("delta")) for levels in (None, 1, 2, 16, 250, 256)),
    (SparseMask(), 2),
    *((ZeroRuns(), levels) for levels in (2, 3, 4, 5, 6, 7, 15, 16, 243)),
    (ZeroRuns(0), 3),
    (ZeroRuns(2), 3),
]
RNG = np.random.default_rng(0)


def coded(coder: Coder, values: np.ndarray, levels: int | None = None) -> bytes:
    """Returns the bytes of `values`, and checks that they are decoded exactly."""
    symbols = torch.from_numpy(values)
    spec = TensorSpec(tuple(symbols.shape), symbols.dtype, levels)
    data = bytes(coder.encode(symbols, spec))
    assert torch.equal(coder.decode(memoryview(data), spec), symbols)
    return data


def decoded(coder: Coder, data: bytes, n: int, dtype: torch.dtype = torch.int32, levels: int | None = None) -> Tensor:
    return coder.decode(memoryview(data), TensorSpec((n,), dtype, levels))


# ------------------------------------------------------------------------------------------------ Golomb, Elias


def golomb_by_hand(values: list[int], m: int) -> tuple[str, str, str]:
    """Returns the textbook's code words: unary quotients, and heads and last bits of truncated binary remainders."""
    quotients = heads = ""
    width = (m - 1).bit_length()
    parts: list[str] = []
    for v in values:
        quotients += "0" * (v // m) + "1"
        r, short = v % m, 2**width - m
        parts.append(format(r, f"0{width - 1}b") if r < short else format(r + short, f"0{width}b")) if m > 1 else None
    if width > 1:
        heads = "".join(part[width - 2 - bit] for bit in range(width - 1) for part in parts)
    return quotients, heads, "".join(part[width - 1 :] for part in parts)


@pytest.mark.parametrize("mean", [0, 0.3, 1.5, 2, 3, 5, 8, 12, 100, 3000])
def test_golomb_is_the_textbooks(mean: float) -> None:
    values = (RNG.geometric(1 / (1 + mean), 500) - 1).astype(np.int32)
    data = coded(Golomb(), values, 1 << 30)
    m = int(2 ** (data[0] / 8))
    theta = values.mean() / (1 + values.mean())
    if theta:  # the least m with θᵐ + θᵐ⁺¹ ≤ 1 is best (Gallager and van Voorhis 1975); m is at most 9 % above
        best = next(m for m in itertools.count(1) if theta**m + theta ** (m + 1) <= 1)
        assert best <= m <= best * 2**0.125
    bits = "".join(golomb_by_hand(values.tolist(), m))
    padded = bits.ljust(-(-len(bits) // 8) * 8, "0")
    assert data[1:] == bytes(int(padded[i : i + 8][::-1], 2) for i in range(0, len(padded), 8))


@pytest.mark.parametrize("mean", [0.2, 1, 2, 4, 7.5, 30, 1000])
def test_golomb_length_on_geometric_symbols(mean: float) -> None:
    # each symbol occurs as often as expected, so that no sampling noise remains
    theta, n = mean / (1 + mean), 400_000
    highest = math.ceil(math.log(1e-9) / math.log(theta))
    probabilities = (1 - theta) * theta ** np.arange(highest)
    counts = np.diff(np.round(np.cumsum(probabilities) * n).astype(int), prepend=0)
    values = np.repeat(np.arange(highest, dtype=np.int32), counts)
    RNG.shuffle(values)
    data = coded(Golomb(), values, 1 << 30)
    m = int(2 ** (data[0] / 8))
    width = (m - 1).bit_length()
    formula = width + theta ** (2**width - m) / (1 - theta**m) if m > 1 else 1 / (1 - theta)
    rate = 8 * len(data) / len(values)
    assert rate == pytest.approx(formula, rel=1e-3)
    entropy = (-theta * math.log2(theta) - (1 - theta) * math.log2(1 - theta)) / (1 - theta)
    assert entropy - 1e-3 <= rate
    if mean >= 1:
        assert rate <= entropy + (0.05 if mean >= 2 else 0.11)


def gamma_length(x: int) -> int:
    return 2 * int(math.log2(x)) + 1


def delta_length(x: int) -> int:
    return int(math.log2(x)) + gamma_length(int(math.log2(x)) + 1)


@pytest.mark.parametrize(("code", "length"), [("gamma", gamma_length), ("delta", delta_length)])
def test_elias_lengths(code: str, length: object) -> None:
    assert callable(length)
    for x in [*range(1, 70), 255, 256, 2**16 - 1, 2**16, 2**31 - 1, 2**31]:
        values = np.full(8, x - 1, np.int64)
        assert len(coded(Elias(code), values, 1 << 32)) == length(x), x  # 8 symbols: as many bytes as one has bits
    values = RNG.integers(0, 5000, 999).astype(np.int32)
    assert len(coded(Elias(code), values, 5000)) == -(-sum(length(int(v) + 1) for v in values) // 8)
    assert (gamma_length(31), gamma_length(32)) == (9, 11)
    assert (delta_length(31), delta_length(32)) == (9, 10)


def test_elias_words() -> None:
    # 1 is 1, 2 is 01 0, 3 is 01 1, 9 is 0001 and 001 from the lowest bit: all unary parts, then all lowest bits, and so
    # on
    data = coded(Elias("gamma"), np.array([0, 1, 2, 8], np.int32), 16)
    assert data == bytes([int("10101000"[::-1], 2), int("10110000"[::-1], 2)])
    # delta has the lengths 1, 2, 2, 4 in gamma (1, 01 0, 01 0, 001 00), then the same mantissas
    data = coded(Elias("delta"), np.array([0, 1, 2, 8], np.int32), 16)
    assert data == bytes([int("10101001"[::-1], 2), int("00000110"[::-1], 2), 0])


@pytest.mark.parametrize("coder", [Golomb(), Elias("gamma"), Elias("delta")], ids=str)
def test_every_integer_comes_back(coder: Coder) -> None:
    low, high = -(2**31), 2**31 - 1
    for n in (1, 2, 5, 16_383, 16_384, 16_385, 100_000):  # near the size of a block
        values = RNG.integers(low, high, n, endpoint=True).astype(np.int32)
        values[[0, -1]] = low, high
        coded(coder, values)
        coded(coder, RNG.geometric(0.2, n).astype(np.int32) * RNG.choice([-1, 1], n).astype(np.int32))
        coded(coder, RNG.integers(0, 2**32, n), 2**32)
    for value in (low, -2, -1, 0, 1, 2, high):
        for n in (1, 20_000):
            coded(coder, np.full(n, value, np.int32))
    outlier = np.zeros(50_000, np.int32)
    outlier[777] = low  # an outlier costs its bits, and the divisor still fits the mean
    assert len(coded(coder, outlier)) < 50_000 * (2.7 + 18) / 8
    for beyond in (torch.tensor([2**31]), torch.tensor([-(2**31) - 1])):
        with pytest.raises(ValueError, match="a symbol is not from"):
            coder.encode(beyond, TensorSpec((1,), torch.int64))
    for levels, value in ((4, 4), (4, -1), (1, 1)):
        with pytest.raises(ValueError, match="a symbol is not from"):
            coder.encode(torch.tensor([value]), TensorSpec((1,), torch.int64, levels))
    with pytest.raises(ValueError, match="float32"):
        coder.encode(torch.zeros(3), TensorSpec((3,), torch.float32))


@pytest.mark.parametrize("coder", [Golomb(), Elias("gamma"), Elias("delta")], ids=str)
def test_a_boolean_is_0_or_1(coder: Coder) -> None:
    coded(coder, np.array([True, False, True]))
    data = bytes(coder.encode(torch.tensor([2, 0, 7], dtype=torch.uint8), TensorSpec((3,), torch.uint8)))
    with pytest.raises(ValueError, match="a symbol is not from 0 to 1"):
        decoded(coder, data, 3, torch.bool)


def test_elias_is_gamma_or_delta() -> None:
    with pytest.raises(ValueError, match="code must be gamma or delta, not 'omega'"):
        Elias("omega")


# ------------------------------------------------------------------------------------------------ masks


def entropy_of(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


@pytest.mark.parametrize("p", [0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.36, 0.38, 0.4, 0.5, 0.62, 0.7, 0.9, 0.999])
def test_masks_near_their_entropy(p: float) -> None:
    n = 400_000
    mask = (RNG.random(n) < p).astype(np.uint8)
    size, share = len(coded(SparseMask(), mask, 2)), mask.mean()
    excess = 1.044 if 0.36 < min(share, 1 - share) < 0.4 else 1.03
    assert n * entropy_of(share) / 8 * 0.99 < size <= n * entropy_of(share) / 8 * excess + 16
    assert size <= 1 + n // 8


@pytest.mark.parametrize("n", [100, 1000, 10_000, 100_000])
def test_masks_of_few_ones_take_some_bytes_more(n: int) -> None:
    for ones in (1, 2, 3, 5, 10, 30, 100):
        least = math.log2(math.comb(n, ones)) / 8
        for _ in range(10):
            mask = (RNG.permutation(n) < ones).astype(np.uint8)
            assert len(coded(SparseMask(), mask, 2)) <= 1.03 * least + 7
    mask = (RNG.permutation(100_000) < 10).astype(np.uint8)
    assert 22 <= len(coded(SparseMask(), mask, 2)) <= 24


def test_masks_of_any_kind() -> None:
    for n in (1, 2, 7, 8, 9, 63, 64, 1000, 40_000):
        for ones in sorted({0, 1, n // 3, n // 2, n - 1, n}):
            for mask in (np.arange(n) < ones, np.arange(n) >= n - ones, RNG.permutation(n) < ones):
                data = coded(SparseMask(), mask.astype(np.uint8), 2)
                assert len(data) <= 1 + -(-n // 8)
    for _ in range(500):  # gaps and bitmap take nearly the same number of bytes
        mask = RNG.random(RNG.integers(40, 200)) < RNG.uniform(0.1, 0.37)
        assert len(coded(SparseMask(), mask.astype(np.uint8), 2)) <= 1 + -(-len(mask) // 8)
    assert len(coded(SparseMask(), np.zeros(10**6, np.uint8), 2)) == 5
    assert len(coded(SparseMask(), np.ones(10**6, np.uint8), 2)) == 5
    assert coded(SparseMask(), np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], np.uint8), 2) == b"\xff\x0d\x01"
    # 3 ones of 80 with the gaps 9, 19 and 29. The mean 77/3 gives θ = 77/80 and the divisor 18; the next one that a
    # byte can name is 19
    mask = np.zeros(80, np.uint8)
    mask[[9, 29, 59]] = 1
    data = coded(SparseMask(), mask, 2)
    assert data[:5] == bytes([34, 3, 0, 0, 0])
    bits = "".join(golomb_by_hand([9, 19, 29], 19))
    assert data[5:] == bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    for bad in (2, 256, -1):
        with pytest.raises(ValueError, match="not from 0 to 1"):
            SparseMask().encode(torch.tensor([0, bad]), TensorSpec((2,), torch.int64, 2))
    with pytest.raises(ValueError, match="2 levels"):
        SparseMask().encode(torch.zeros(3, dtype=torch.uint8), TensorSpec((3,), torch.uint8, 3))


# ------------------------------------------------------------------------------------------------ zero runs


def quartic_by_hand(values: list[int]) -> list[int]:
    """Returns the bytes of 3LC (Lim 2019, §3.2, 3.3), written as a loop: quartic encoding, then zero-run encoding."""
    values = values + [1] * (-len(values) % 5)
    packed = [int("".join(map(str, values[i : i + 5])), 3) for i in range(0, len(values), 5)]
    out: list[int] = []
    for byte, run in ((byte, len(list(group))) for byte, group in itertools.groupby(packed)):
        while byte == 121 and run > 1:
            out.append(243 + min(run, 14) - 2)
            run -= min(run, 14)
        out += [byte] * run
    return out


@pytest.mark.parametrize("zeros", [0.2, 0.9, 0.99])
def test_zero_runs_are_3lc(zeros: float) -> None:
    for n in (1, 4, 5, 6, 69, 70, 71, 75, 76, 9999):
        values = RNG.choice(3, n, p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2]).astype(np.uint8)
        assert list(coded(ZeroRuns(), values, 3)) == quartic_by_hand(values.tolist())


def test_zero_runs_by_number() -> None:
    no_zero = RNG.choice([0, 2], 10_000).astype(np.uint8)
    assert len(coded(ZeroRuns(), no_zero, 3)) == 2000  # 1.6 bits each
    # the bytes 243 to 255 are runs of 2 to 14 bytes of five zeros. The best case of the paper is 280 times shorter than
    # float32
    assert [coded(ZeroRuns(), np.ones(5 * run, np.uint8), 3)[0] for run in range(1, 15)] == [121, *range(243, 256)]
    assert len(coded(ZeroRuns(), np.ones(70_000, np.uint8), 3)) == 1000
    assert coded(ZeroRuns(), np.ones(5 * 29, np.uint8), 3) == bytes([255, 255, 121])
    assert coded(ZeroRuns(0), np.zeros(5 * 3, np.uint8), 3) == bytes([244])
    assert coded(ZeroRuns(2), np.full(5 * 3, 2, np.uint8), 3) == bytes([244])
    for levels, digits in ((2, 7), (3, 5), (4, 3), (5, 3), (6, 3), (7, 2), (15, 2), (16, 1), (243, 1)):
        worst = np.full(digits * 100, levels - 1, np.uint8)
        assert len(coded(ZeroRuns(0), worst, levels)) == 100
        longest = 257 - levels**digits
        for run in (1, 2, longest - 1, longest, longest + 1, 2 * longest, 2 * longest + 2):
            pieces = run // longest + (run % longest > 0)
            assert len(coded(ZeroRuns(0), np.zeros(digits * run, np.uint8), levels)) == pieces
    for levels, zero in ((244, None), (3, 3), (None, 0), (1, 0)):
        with pytest.raises(ValueError, match="ZeroRuns packs"):
            ZeroRuns(zero).encode(torch.zeros(3, dtype=torch.uint8), TensorSpec((3,), torch.uint8, levels))
    with pytest.raises(ValueError, match="a symbol is not from 0 to 2"):
        ZeroRuns().encode(torch.tensor([3]), TensorSpec((1,), torch.int64, 3))
    with pytest.raises(ValueError, match="zero must be at least 0, not -1"):
        ZeroRuns(-1)


# ------------------------------------------------------------------------------------------------ hostile bytes


@pytest.mark.parametrize(
    ("coder", "n", "levels", "data", "why"),
    [
        (Golomb(), 3, None, b"", "no Golomb code"),
        (Golomb(), 3, None, b"\xfd\x07\0", "no Golomb code"),  # no divisor has this byte
        (Golomb(), 3, None, b"\0" + bytes(16), "no Golomb code"),  # longer than any code
        (Golomb(), 3, None, b"\0\x03", "3 unary numbers"),
        (Golomb(), 3, None, b"\x20\x07", "bits end"),
        (Golomb(), 3, None, b"\0\x0f", "not zero"),
        (Golomb(), 3, None, b"\0\x07\0", "after the last"),
        (Golomb(), 2, 4, b"\0\x21", "not from 0 to 3"),
        (Golomb(), 1, None, b"\xfc\x04" + bytes(4), "32 bits"),
        (Elias(), 2, None, b"\x01", "2 unary numbers"),
        (Elias(), 2, None, b"\x48", "bits end"),
        (Elias(), 2, None, b"\x03\x01", "after the last"),
        (Elias(), 2, None, b"\x07", "not zero"),
        (Elias(), 1, None, bytes(10), "no Elias code"),
        (Elias(), 2, 4, b"\x05\x0f\0", "after the last"),
        (Elias(), 1, None, b"\0\0\0\0\x02" + bytes(4), "33 bits"),
        (Elias(), 1, None, b"\0\0\0\0\x01\x01\0\0\0", "32 bits"),
        (Elias(), 1, 4, b"\x04\0", "after the last"),
        (Elias(), 1, 2, b"\x04", "not from 0 to 1"),
        (Elias("delta"), 1, None, b"\x40" + bytes(8), "33 bits"),
        (SparseMask(), 80, 2, b"", "no mask"),
        (SparseMask(), 80, 2, b"\xff" + bytes(9), "cut"),
        (SparseMask(), 80, 2, b"\xff" + bytes(11), "no mask"),
        (SparseMask(), 79, 2, b"\xff" + bytes(9) + b"\x80", "ones after"),
        (SparseMask(), 80, 2, b"\x22\x03\0\0", "not 4294967295 ones|has not"),
        (SparseMask(), 80, 2, b"\x22\x51\0\0\0", "not 81 ones"),
        (SparseMask(), 80, 2, b"\xfd\x03\0\0\0", "has not"),
        (SparseMask(), 80, 2, b"\x22\x03\0\0\0\x07", "bits end"),
        (SparseMask(), 80, 2, b"\x22\x01\0\0\0\x00\x08", "bits end|has no element"),
        (SparseMask(), 80, 2, b"\x08\x01\0\0\0\0\0\0\0\0\x01", "no element"),
        (ZeroRuns(), 10, 3, b"\0", "2 bytes before runs"),
        (ZeroRuns(), 10, 3, b"\0\0\0", "2 bytes before runs"),
        (ZeroRuns(), 10, 3, b"\xff", "2 bytes before runs"),
        (ZeroRuns(), 10, 3, b"\x79\x79", "split"),
        (ZeroRuns(), 25, 3, b"\xf3\xf4", "split"),
        (ZeroRuns(), 9, 3, b"\0\0", "filled up"),
        (ZeroRuns(), 3, 243, b"\0\x01", "3 bytes before runs"),
    ],
)
def test_bytes_never_made_are_refused(coder: Coder, n: int, levels: int | None, data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decoded(coder, data, n, torch.int32, levels)


@pytest.mark.parametrize(("coder", "levels"), CODERS, ids=str)
def test_any_bytes_are_refused_or_decoded(coder: Coder, levels: int | None) -> None:
    """Any bytes raise ValueError or decode to symbols in range."""
    dice = random.Random(1)
    for i in range(400):
        n = dice.choice([0, 1, 2, 9, 100])
        spec = TensorSpec((n,), torch.int32, levels)
        data = bytearray(coder.encode(torch.arange(n, dtype=torch.int32) % (levels or 50), spec))
        if i % 3 == 0:
            data = bytearray(dice.randbytes(dice.randrange(30)))
        elif i % 3 == 1:
            data = data[: dice.randrange(len(data) + 1)]
        for _ in range(min(len(data), i % 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            back = coder.decode(memoryview(bytes(data)), spec)
        except ValueError:
            continue
        assert back.shape == (n,)
        assert levels is None or n == 0 or 0 <= int(back.min()) <= int(back.max()) < levels


@pytest.mark.parametrize("coder", [Elias(), Golomb()], ids=str)
@pytest.mark.parametrize("tail", [b"", b"\xff" * 2**15], ids=["none", "ones at the end"])
@pytest.mark.parametrize("fill", [b"\0", b"\1", b"\0" * 4095 + b"\xff", b"\xff"])
def test_hostile_bytes_take_no_more_memory_than_some_times_themselves(coder: Coder, fill: bytes, tail: bytes) -> None:
    n = 1 << 18
    spec = TensorSpec.symbols((n,), 256)
    most = 9 * n if isinstance(coder, Elias) else 5 * n + 1  # longer bytes are refused at once
    data = b"\1" + (fill * (most // len(fill)))[: most - 1 - len(tail)] + tail
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            coder.decode(data, spec)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(data)


def test_zero_runs_longer_than_their_tensor_are_refused_at_once() -> None:
    data = b"\0" * 4_000_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="bytes before runs are expected"):
            ZeroRuns().decode(memoryview(data), TensorSpec.symbols((400,), 3))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**16
