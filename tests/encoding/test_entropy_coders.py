"""Compares real bytes of Huffman, ANS, Zstandard and Shortest with entropies and with other programs."""

import hashlib
import heapq
import itertools
import math
import random
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fedq.encoding import (
    ANS,
    CABAC,
    Encoder,
    FixedWidth,
    Huffman,
    Key,
    Shortest,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    TrellisQuantization,
    UniformQuantization,
    Zstandard,
)
from fedq.encoding.coders import Coder, huffman, models, tokens, tokens_loops
from fedq.errors import FedqError, MissingPackage

MODELS = ("empirical", "normal", "laplace", "student", "adaptive")
BEST = Shortest((Huffman(), ANS(), FixedWidth(), Zstandard()))

CODERS: list[tuple[Coder, int | None]] = [(ANS(model), levels) for model in MODELS for levels in (None, 256)]
CODERS += [(coder, levels) for coder in (ANS(), Huffman(), Zstandard()) for levels in (1, 2, 3, 16)]
CODERS += [
    (Huffman(), None),
    (Huffman(), 256),
    (Zstandard(19), None),
    (Zstandard(), 256),
    (BEST, 100),
    (Shortest([ANS()]), None),
]
WIDE_CODERS: list[tuple[Coder, int | None]] = [
    (coder, levels) for coder in (ANS(), Huffman(), Zstandard(), BEST) for levels in (257, 4096, 4097, 65_536)
]


def spec_of(x: Tensor, levels: int | None) -> TensorSpec:
    return TensorSpec(tuple(x.shape), x.dtype, levels)


def entropy(x: Tensor) -> float:
    """Returns the empirical entropy in bits a symbol."""
    shares = torch.unique(x, return_counts=True)[1].double() / x.numel()
    return float(-(shares * shares.log2()).sum())


def rate(coder: Coder, x: Tensor, levels: int | None) -> float:
    """Returns the real bits a symbol, and checks that the symbols are decoded exactly."""
    data = coder.encode(x, spec_of(x, levels))
    assert torch.equal(coder.decode(memoryview(data), spec_of(x, levels)), x)
    return 8 * len(data) / x.numel()


def drawn(shares: np.ndarray, n: int = 1_000_000) -> Tensor:
    """Returns symbols 0, 1 … with these shares."""
    cuts = np.cumsum(shares / shares.sum())[:-1]
    return torch.from_numpy(np.searchsorted(cuts, np.random.default_rng(1).random(n)).astype(np.uint8))


def normal(sigma: float, levels: int = 256) -> np.ndarray:
    return np.asarray(scipy.stats.norm.pdf((np.arange(levels) - levels / 2 + 0.3) / sigma))


SOURCES = {
    "0.05 bits of two": np.array([0.9944, 0.0056]),
    "0.05 bits of 256": np.concatenate(([0.9975], np.full(255, 0.0025 / 255))),
    "0.05 bits of 17": np.concatenate(([0.9965], np.full(16, 0.0035 / 16))),
    "a quarter of a bit": np.array([0.97, 0.02, 0.01]),
    "one bit": np.array([1.0, 1.0]),
    "geometric": 0.7 ** np.arange(30.0),
    "two far apart": np.eye(256)[3] + np.eye(256)[250] * 0.2,
    "normal, σ 0.4": normal(0.4),
    "normal, σ 3": normal(3),
    "normal, σ 30": normal(30),
    "ragged": np.random.default_rng(2).exponential(size=200) ** 3 + 1e-9,
    "uniform": np.ones(256),
}
FREQUENCIES = "f4db830eae1aaba8"
GOLDEN: dict[str, str] = {
    "ANS(model='empirical') None": "08ee88605f794578",
    "ANS(model='empirical') 2": "55f79264cd7038d5",
    "ANS(model='empirical') 256": "a34283b7e3713f8f",
    "ANS(model='empirical') 65536": "73925f714bf439e6",
    "ANS(model='normal') None": "a5b65fb891e9a9fd",
    "ANS(model='normal') 2": "2a561c1976173724",
    "ANS(model='normal') 256": "7e02e8a808a34653",
    "ANS(model='normal') 65536": "00146f0009bac85a",
    "ANS(model='laplace') None": "9ba237b04189f93d",
    "ANS(model='laplace') 2": "91c750e691757b52",
    "ANS(model='laplace') 256": "fe6dc0919334ae92",
    "ANS(model='laplace') 65536": "6415ac97a1703005",
    "ANS(model='student') None": "d595aeb341707eda",
    "ANS(model='student') 2": "871d6365b0c3e3bc",
    "ANS(model='student') 256": "f42825548ede7fea",
    "ANS(model='student') 65536": "7eb40af428fda50c",
    "ANS(model='adaptive') None": "81aa843349e6adba",
    "ANS(model='adaptive') 2": "b0405855ce508160",
    "ANS(model='adaptive') 256": "b65a555a8e785aad",
    "ANS(model='adaptive') 65536": "48ed8a2f627b3a18",
    "Huffman() None": "d25399c5ee3e01ad",
    "Huffman() 2": "3e32255da2a7ecca",
    "Huffman() 256": "6ebdb649b93eaea9",
    "Huffman() 65536": "3e9f4750e26587d9",
    "Shortest(coders=(ANS(model='empirical'), Huffman())) None": "97d15ad5030353f3",
    "Shortest(coders=(ANS(model='empirical'), Huffman())) 2": "3c8ac723a3fc7c50",
    "Shortest(coders=(ANS(model='empirical'), Huffman())) 256": "7b67362ae9b99b9d",
    "Shortest(coders=(ANS(model='empirical'), Huffman())) 65536": "54d2712250452bc5",
}


@pytest.mark.parametrize("name", SOURCES)
def test_rates_are_entropies(name: str) -> None:
    x = drawn(SOURCES[name])
    least = entropy(x)
    assert 0.04 < least <= 8
    # the worst case has 255 rare symbols, each below the least frequency
    assert least <= rate(ANS(), x, 256) <= (1.025 if name == "0.05 bits of 256" else 1.01) * least
    assert least - 1e-4 <= rate(ANS("adaptive"), x, 256) <= 1.01 * least + 0.004  # the coder learns 256 frequencies
    best = heap_huffman(torch.bincount(x).numpy()) / x.numel()
    assert best <= rate(Huffman(), x, 256) <= 1.004 * best + 0.002
    if least > 3:
        assert best < 1.03 * least + 0.05
    assert rate(BEST, x, 256) == pytest.approx(min(rate(coder, x, 256) for coder in BEST.coders) + 8e-6, abs=1e-9)
    for model in ("normal", "laplace", "student"):
        assert rate(ANS(model), x, 256) < 8.001  # never worse than no model at all


def heap_huffman(counts: np.ndarray) -> int:
    """Returns the bits of the best prefix code by Huffman's algorithm: the sum of the weights of all inner nodes."""
    heap, total = [int(count) for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total


def test_limited_codes_are_the_best() -> None:
    draw = random.Random(3)
    for symbols, limit in itertools.product((2, 3, 4, 5), (3, 4)):
        for _ in range(10):
            weights = np.array([int(draw.random() ** 6 * 1e6) + 1 for _ in range(symbols)])
            found = huffman.code_lengths(weights, limit)
            assert sum(2.0**-length for length in found) == 1
            cheapest = min(
                int((weights * lengths).sum())
                for lengths in itertools.product(range(1, limit + 1), repeat=symbols)
                if sum(2.0**-length for length in lengths) <= 1
            )
            assert int((weights * found).sum()) == cheapest
    for weights in (np.arange(1, 4097) ** 2, np.ones(4096, np.int64), 2 ** np.arange(40)):
        found = huffman.code_lengths(weights, 15)
        assert found.max() <= 15 and (2.0**-found).sum() == 1
    weights = np.arange(1, 301)
    assert int((weights * huffman.code_lengths(weights, 15)).sum()) == heap_huffman(weights)
    assert huffman.code_lengths(np.array([7]), 12).tolist() == [0]


def test_nothing_costs_nothing() -> None:
    for coder in (*(ANS(model) for model in MODELS), Huffman(), Zstandard(), BEST):
        for levels, x in ((256, torch.full((1_000_000,), 255).byte()), (2, torch.zeros(1_000_000).byte())):
            assert rate(coder, x, levels) * 1_000_000 / 8 <= 100, coder
            assert coder.size(spec_of(x, levels)) is None
    for coder in (*(ANS(model) for model in MODELS), Huffman()):
        assert rate(coder, torch.full((100_000,), -(2**31), dtype=torch.int32), None) * 100_000 / 8 <= 32
        assert coder.encode(torch.zeros(3, 0).byte(), TensorSpec((3, 0), torch.uint8, 5)) == b""


def test_any_integer_of_32_bits() -> None:
    draw, n = np.random.default_rng(4), 200_000
    heavy = torch.from_numpy(np.clip(np.rint(draw.standard_t(1, n) * 20), -(2**31), 2**31 - 1)).int()
    edge = torch.tensor([2**31 - 1, -(2**31), 0, -1, 1, 1023, 1024, -1023, -1024, 2**30, 2047, 2048, -(2**30) - 1])
    anything = torch.from_numpy(draw.integers(-(2**31), 2**31, n))
    smooth = torch.from_numpy(np.rint(draw.normal(30_000, 5000, n)).clip(0, 65_535)).int()
    ends = torch.cat((torch.full((1000,), -(2**31)), torch.tensor([2**31 - 1]))).int()
    for coder in (*(ANS(model) for model in MODELS), Huffman()):
        for x in (edge.int(), edge, edge.flip(0).int(), ends):
            rate(coder, x, None)
        assert rate(coder, anything, None) < 32.9
        # nearly every symbol differs, so the test compares with differential entropies
        assert rate(coder, heavy, None) < math.log2(4 * math.pi * 20) + (1.5 if coder == ANS("normal") else 0.3)
        assert rate(coder, smooth, 65_536) < 0.5 * math.log2(2 * math.pi * math.e * 5000**2) + 0.25
        for beyond in (2**31, -(2**31) - 1):
            with pytest.raises(ValueError, match="symbol"):
                coder.encode(torch.tensor([beyond]), TensorSpec((1,), torch.int64))
    for coder in (ANS(), Huffman(), Zstandard(), BEST):
        for beyond, levels in ((5, 5), (-1, 5), (-1, 300), (65_536, 65_536)):
            with pytest.raises(ValueError, match="symbol"):
                coder.encode(torch.tensor([0, beyond]), TensorSpec((2,), torch.int64, levels))
    for coder in (ANS(), Huffman()):
        with pytest.raises(ValueError, match="integers"):
            coder.encode(torch.zeros(1), TensorSpec((1,), torch.float32))


@pytest.mark.parametrize(
    ("family", "law"), [("normal", scipy.stats.norm), ("laplace", scipy.stats.laplace), ("student", scipy.stats.t(3))]
)
def test_families_are_what_they_are_called(family: str, law: scipy.stats.rv_continuous) -> None:
    edges, freedom = tokens.edges(TensorSpec((1,), torch.uint8, 256)), 3 if family == "student" else 0
    for scale, location in ((16 * 7 + 5, 128 * 256 + 77), (16 * 4, 100 * 256), (16 * 9 + 15, 3 * 256)):
        unit = (16 + scale % 16) / 16 * 2.0 ** (scale // 16 - 4)
        expected = np.diff(law.cdf((edges - location / 256) / unit))
        data = memoryview(models._WIRE.pack(scale, location, freedom) + b"rest")
        found, rest = models.take(family, data, edges)
        assert bytes(rest) == b"rest" and found.sum() == 2**16 and found.min() >= 1
        assert np.abs(found / 2**16 - expected / expected.sum()).max() < 0.005
    draw = law.rvs(size=300_000, random_state=5) * 7 + 90.3
    symbols = torch.from_numpy(np.rint(draw).clip(0, 255)).byte()
    wire = memoryview(ANS(family).encode(symbols, spec_of(symbols, 256)))
    scale, location, found_freedom = models._WIRE.unpack_from(wire, 4)
    assert abs(location / 256 - 90.3) < 0.1 and found_freedom == freedom
    assert (16 + scale % 16) / 16 * 2.0 ** (scale // 16 - 4) == pytest.approx(7, rel=0.07)
    assert ANS(family).model_size(wire) == 4 + models.SIZE
    assert 8 * len(wire) / len(draw) < 1.005 * entropy(symbols)


def test_frequencies_are_the_same_everywhere() -> None:
    t = np.linspace(0, 700, 10_001)
    assert np.abs(models._density("laplace", t, 0) - np.exp(-t)).max() < 1e-9
    wide, digest = tokens.edges(TensorSpec((1,), torch.int32)), hashlib.sha256()
    assert len(wide) == tokens.alphabet(TensorSpec((1,), torch.int32)) + 1 and (np.diff(wide) > 0).all()
    parameters = list(itertools.product((0, 40, 99, 250, 607), (0, -(2**31), 30_001)))
    for edges in (tokens.edges(TensorSpec((1,), torch.uint8, 256)), wide):
        for family, (scale, location) in itertools.product(("normal", "laplace", "student"), parameters):
            data = memoryview(models._WIRE.pack(scale, location, 3 if family == "student" else 0))
            frequencies = models.take(family, data, edges)[0]
            assert frequencies.sum() == 2**16 and frequencies.min() >= 1
            digest.update(frequencies.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == FREQUENCIES


def test_tables_are_small_and_told() -> None:
    unbounded = torch.from_numpy(np.rint(np.random.default_rng(6).normal(0, 3, 10**5))).int()
    for name, x, levels, most in (
        ("normal", drawn(normal(25)), 256, 160),
        ("uniform", drawn(np.ones(256)), 256, 200),
        ("ragged", drawn(SOURCES["ragged"]), 256, 330),
        ("four bits", drawn(normal(2, 16)), 16, 40),
        ("one", torch.zeros(99).byte(), 256, 12),
        ("unbounded", unbounded, None, 50),
    ):
        for coder in (ANS(), Huffman()):
            data = memoryview(coder.encode(x, spec_of(x, levels)))
            assert 0 < coder.model_size(data) <= most, (name, coder, coder.model_size(data))
            best = Shortest([coder])
            assert best.model_size(memoryview(best.encode(x, spec_of(x, levels)))) == coder.model_size(data)
    assert ANS().encode(drawn(normal(25)), TensorSpec((1_000_000,), torch.uint8, 256))[4] <= 14  # finer would not pay
    x = drawn(normal(25), 10_000)
    assert rate(ANS(), x, 256) < entropy(x) * 1.02  # a fine table would cost more than it saves
    assert ANS("adaptive").model_size(memoryview(ANS("adaptive").encode(x, spec_of(x, 256)))) == 4
    assert [coder.model_size(memoryview(b"")) for coder in (ANS(), Huffman(), Zstandard())] == [0, 0, 0]


def test_numbers_of_tables() -> None:
    draw = random.Random(7)
    for size in (1, 2, 9, 300, 4096):
        for numbers in (
            [draw.choice((0, 0, 0, 1, 65_536)) for _ in range(size)],
            [0] * size,
            [65_536] * size,
            list(range(size)),
            [int(draw.random() ** 9 * 65_536) for _ in range(size)],
        ):
            data = tokens.pack_numbers(np.array(numbers))
            assert len(data) <= 2.5 * size + 5
            found, rest = tokens.take_numbers(memoryview(data + b"rest"), size)
            assert found.tolist() == numbers and bytes(rest) == b"rest"
            with pytest.raises(ValueError):
                tokens.take_numbers(memoryview(data[:-1]), size)


def test_frequencies_are_in_proportion() -> None:
    draw = np.random.default_rng(8)
    for size, bits in ((1, 10), (2, 10), (1024, 10), (256, 12), (256, 16), (4096, 16)):
        for power in (0, 1, 4, 40):
            counts = (draw.random(size) ** power * 1e6).astype(np.int64)
            counts[draw.integers(size)] += 1
            found = tokens.normalise(counts, bits)
            assert found.sum() == 2**bits and found.min() >= 1
            # symbols that are not raised to 1 share the rest in proportion, within 1
            ones = counts * 2**bits < counts.sum()
            rest = 2**bits - int(ones.sum())
            ideal = counts * rest / max(1, counts[~ones].sum())
            assert (found[ones] == 1).all() and np.abs(found - ideal)[found > 1].max(initial=0) < 1 + 0.001 * 2**bits


def test_the_adaptive_model_follows_a_change() -> None:
    x = torch.cat((drawn(normal(4), 2_000_000), drawn(normal(4), 2_000_000) + 64))
    assert rate(ANS("adaptive"), x, 256) < entropy(x) - 0.8  # the halves differ by nearly 1 bit a symbol
    early = drawn(normal(4), 3000)
    assert rate(ANS("adaptive"), early, 256) < entropy(early) * 1.08


@pytest.mark.parametrize(
    ("make", "argument"),
    [(ANS, "gauss"), (Zstandard, 0), (Zstandard, 23), (Shortest, [])],
)
def test_arguments_are_refused(make: Callable[[object], object], argument: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make(argument)


def fixed(n: int, levels: int | None) -> Tensor:
    """Returns symbols from integer arithmetic; small symbols are more frequent."""
    i = torch.arange(n, dtype=torch.int64)
    x = (i * i * 40_503 + i * 12_289) % 65_521 * ((i * 30_011) % 65_537) // 65_537
    if levels is None:
        return (x * x // 200_000 - 300).int()
    return (x * levels // 65_537).to(torch.uint8 if levels <= 256 else torch.int32)


def test_golden_bytes() -> None:
    coders, found = (*(ANS(model) for model in MODELS), Huffman(), Shortest((ANS(), Huffman()))), {}
    for coder, levels in itertools.product(coders, (None, 2, 256, 65_536)):
        x = fixed(3001, levels)
        found[f"{coder} {levels}"] = hashlib.sha256(coder.encode(x, spec_of(x, levels))).hexdigest()[:16]
    assert found == GOLDEN


def test_a_renamed_coder_keeps_its_fingerprint() -> None:
    encoder = StateDictEncoder(Encoder([UniformQuantization(4)], Shortest([ANS(), Huffman()])), 0)
    codec = encoder.bind({"x": TensorSpec((10,), torch.float32)})
    message = codec.encode({"x": torch.arange(10.0)}, Key(0)).message
    assert message[8:16].hex() == "18da798b3649a1fd"  # Shortest under its old name, fedq.encoding.Best


def test_threads_give_the_same_bytes() -> None:
    x = drawn(normal(20), 200_000)
    coders = [ANS(), ANS("adaptive"), Huffman()]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda coder: bytes(coder.encode(x, spec_of(x, 256))), coders * 3))
    assert found == [bytes(coder.encode(x, spec_of(x, 256))) for coder in coders] * 3


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(MissingPackage, FedqError)  # the command line shows such an error in one sentence
    x = fixed(100, 256)
    for module in [name for name in sys.modules if name.endswith("_loops") or name == "fedq.encoding.compiled"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for coder in (ANS(), Huffman(), CABAC(), Zstandard()):
        with pytest.raises(MissingPackage, match=r'pip install "fedq\[coders\]"'):
            coder.encode(x, spec_of(x, 256))
    for stage in (StepQuantization(0.1, rate_weight=0.1), TrellisQuantization(0.1)):
        with pytest.raises(MissingPackage, match=r'pip install "fedq\[coders\]"'):
            stage.encode(torch.randn(100), Key(0))


# ------------------------------------------------------------------------------------------- hostile bytes


@pytest.mark.timeout(60)
def test_damage_is_an_error_or_a_tensor() -> None:
    draw, errors = random.Random(9), 0
    coders = [*(ANS(model) for model in MODELS), Huffman(), Zstandard(), Shortest((ANS(), Huffman()))]
    cases = []
    for coder, levels, n in itertools.product(coders, (None, 3, 256, 65_536), (1, 6, 700)):
        x = fixed(n, levels)
        cases.append((coder, spec_of(x, levels), bytes(coder.encode(x, spec_of(x, levels)))))
    for i in range(4000):
        coder, spec, data = cases[i % len(cases)]
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(min(len(damaged) + 1, draw.choice((8, 40, 4000))))
            what = draw.randrange(4)
            if what == 0:
                damaged[at : at + 1] = bytes([draw.choice((0, 255, draw.randrange(256)))])
            elif what == 1 and at < len(damaged):
                damaged[at] ^= 1 << draw.randrange(8)
            elif what == 2:
                damaged[at : at + draw.randrange(4)] = draw.randbytes(draw.randrange(4))
            elif what == 3 and draw.random() < 0.2:
                del damaged[at:]
        try:
            back = coder.decode(memoryview(bytes(damaged)), spec)
        except ValueError:
            errors += bytes(damaged) != data
            continue
        assert back.shape == spec.shape and back.dtype == spec.dtype
        assert spec.levels is None or 0 <= int(back.min()) <= int(back.max()) < spec.levels
    assert errors > 2000


def test_every_cut_and_every_rest_is_an_error() -> None:
    for coder in (*(ANS(model) for model in MODELS), Huffman(), Zstandard(), Shortest((FixedWidth(), ANS()))):
        for levels in (None, 256, 65_536):
            if isinstance(coder, Shortest) and levels is None:
                continue
            x = fixed(60, levels)
            spec = spec_of(x, levels)
            data = bytes(coder.encode(x, spec))
            for wrong in (*(data[:i] for i in range(len(data))), data + b"\0", data + b"\0\0", data + data):
                with pytest.raises(ValueError):
                    coder.decode(memoryview(wrong), spec)
            with pytest.raises(ValueError):
                coder.decode(memoryview(data), spec_of(x[:0], levels))


def test_a_changed_stream_does_not_end_where_it_should() -> None:
    x = fixed(300, 256)
    for model in MODELS:
        coder, refused = ANS(model), 0
        data = bytearray(coder.encode(x, spec_of(x, 256)))
        begin = coder.model_size(memoryview(data))
        for i in range(begin, len(data)):
            data[i] ^= 1
            try:
                coder.decode(memoryview(bytes(data)), spec_of(x, 256))
            except ValueError:
                refused += 1
            data[i] ^= 1
        # some changes swap two equally rare symbols, which gives the message of other symbols
        assert refused >= 0.85 * (len(data) - begin)


def test_hostile_headers_are_refused() -> None:
    spec, x = TensorSpec((9,), torch.uint8, 10), torch.arange(9).byte()
    for coder in (*(ANS(model) for model in MODELS), Huffman()):
        data = bytearray(coder.encode(x, spec))
        for head in (b"\xff\xff\xff\xff", b"\x09\0\x01\0", b"\0\0\x0a\0"):
            data[:4] = head
            with pytest.raises(ValueError, match="no tokens"):
                coder.decode(memoryview(data), spec)
    for bits, numbers in ((10, [1024, 1]), (10, [1023]), (11, [2048]), (10, [2048, -1024])):
        steps = np.diff(numbers, prepend=0)  # a negative frequency can be written only as a difference
        out = np.zeros(99, np.uint8)
        used = tokens_loops.golomb_encode(np.where(steps < 0, -2 * steps - 1, 2 * steps), 0, out)
        head = tokens.WINDOW.pack(0, len(numbers) - 1) + bytes([bits, 16])
        with pytest.raises(ValueError, match="frequencies"):
            ANS().decode(memoryview(head + out[:used].tobytes() + bytes(64)), spec)
    for lengths in ([2, 2, 3], [3], [4, 4, 4], [14, 14], [0, 0], [2, 2, 2], [1, 1]):
        head = tokens.WINDOW.pack(0, len(lengths) - 1) + tokens.pack_numbers(np.array(lengths))
        with pytest.raises(ValueError, match="code"):
            Huffman().decode(memoryview(head + struct.pack("<4I", 2, 2, 2, 3) + bytes(9)), spec)
    with pytest.raises(ValueError, match="student"):
        head = tokens.WINDOW.pack(0, 9)
        ANS("student").decode(memoryview(head + models._WIRE.pack(0, 0, 4) + struct.pack("<4I", *[1 << 16] * 4)), spec)
    # one small frame unpacks to very many bytes, and one claims to
    bomb = pytest.importorskip("zstandard").ZstdCompressor(write_content_size=False).compress(bytes(10**8))
    for frame in (bomb, b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + bytes(9)):
        with pytest.raises(ValueError):
            Zstandard().decode(memoryview(frame), spec)
    with pytest.raises(ValueError, match="symbol"):
        Zstandard().decode(memoryview(Zstandard().encode(x + 2, TensorSpec((9,), torch.uint8, 11))), spec)
    for data in (b"", b"\2", b"\0123"):
        with pytest.raises(ValueError):
            Shortest((FixedWidth(), ANS())).decode(memoryview(data), spec)


def test_as_short_as_other_programs() -> None:
    constriction = pytest.importorskip("constriction")
    x = drawn(normal(25))
    shares = torch.bincount(x, minlength=256).double().numpy() / len(x)
    other = constriction.stream.stack.AnsCoder()
    other.encode_reverse(x.int().numpy(), constriction.stream.model.Categorical(shares, perfect=False))
    assert rate(ANS(), x, 256) < 1.001 * 32 * other.num_words() / len(x) + 8 * 300 / len(x)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    other_size = len(deflate.compress(x.numpy().tobytes()) + deflate.flush())
    assert rate(Huffman(), x, 256) < 1.002 * 8 * other_size / len(x)
