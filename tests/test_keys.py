"""Keys: the streams are frozen, are independent, and follow from the key alone."""

import hashlib
import itertools
import random
import struct

import numpy as np
import pytest
import torch

from fedq.encoding import Encoder, FixedWidth, StateDictEncoder, TensorSpec, UniformQuantization
from fedq.keys import BROADCAST, Key

# These numbers never change: they follow from the seed on every machine and in every version.
FROZEN = {
    Key(0): [15117258140996911894, 5010202867557806195, 18194173822857872519],
    Key(1): [11503121881644948551, 8947543852376969690, 9717872120602936464],
    Key(0, 1): [820740416461354395, 16986801691270524786, 17142128634067376237],
    Key(0, 0, 0): [128499126094218379, 7032603500668226518, 11094802480403248351],
    Key(2**64 - 1, 2**32 - 1, 12): [5341889764131029831, 14988704230585557488, 6246720594553918756],
    Key(0).fold("a"): [5221051911861935777, 1773284306004223501, 5692921498759079760],
    Key(0).fold("a").fold("b"): [6537357464502247399, 9172943372171402422, 4214218816536507000],
    Key(42, 3, 7).fold("layer.weight").fold("0"): [15186500511428454693, 13505118969732933541, 9259782776533190953],
    Key(42).fold("größe"): [10884236091051042886, 9830691552876866249, 11112727645060074030],
}


def words(key: Key, n: int = 3) -> list[int]:
    return [int(word) for word in key.bit_generator().random_raw(n)]


@pytest.mark.parametrize("key", FROZEN, ids=str)
def test_streams_are_frozen(key: Key) -> None:
    assert words(key) == FROZEN[key]


@pytest.mark.parametrize("key", FROZEN, ids=str)
def test_streams_are_as_documented(key: Key) -> None:
    data = struct.pack("<QQQ", *key[:3])
    for name in key.path:
        data += struct.pack("<I", len(name.encode())) + name.encode()
    seed = int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "little")
    assert words(key) == np.random.SFC64(np.random.SeedSequence(seed)).random_raw(3).tolist()


def test_the_other_draws_are_frozen() -> None:
    assert Key(0).integer() == 7558629070498455947
    assert Key(0).permutation(8).tolist() == [1, 6, 4, 3, 0, 5, 2, 7]
    assert BROADCAST == 2**64 - 1
    assert Key(5) == Key(5, 0, BROADCAST, ())


def test_equal_keys_give_equal_streams_from_the_start() -> None:
    key = Key(3, 1, 4).fold("x")
    key.bit_generator().random_raw(100)
    assert words(key) == words(Key(3, 1, 4, ("x",)))
    assert words(key, 64)[:3] == words(key)
    assert words(Key(3).fold("x")._replace(round=1, client=4)) == words(key)


def test_all_keys_give_other_streams() -> None:
    paths = [(), ("",), ("", ""), ("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("a", "b", "c"), ("ab\0c",), ("0",)]
    paths += [(f"{i}", f"{j}") for i in (1, 11, 111) for j in (1, 11, 111)]
    numbers = (0, 1, 2, 255, 256, 2**32 - 1)
    keys = [Key(*three, path) for three in itertools.product(numbers, numbers, (*numbers, BROADCAST)) for path in paths]
    assert len({words(key, 1)[0] for key in keys}) == len(keys)


def test_names_do_not_run_together() -> None:
    key = Key(0)
    assert words(key.fold("ab").fold("c")) != words(key.fold("a").fold("bc"))
    assert words(key.fold("abc")) != words(key.fold("ab").fold("c"))
    assert words(key.fold("")) != words(key)
    assert words(key.fold("a").fold("b")) != words(key.fold("b").fold("a"))


def test_fold_leaves_the_key_alone() -> None:
    key = Key(0)
    assert key.fold("a").path == ("a",)
    assert key == Key(0)


@pytest.mark.parametrize("key", [Key(-1), Key(2**64), Key(0, -1), Key(0, 0, -1), Key(0, 0, 2**64)], ids=str)
def test_numbers_that_do_not_fit_are_refused(key: Key) -> None:
    with pytest.raises((ValueError, struct.error)):
        key.bit_generator()


def test_streams_do_not_depend_on_each_other() -> None:
    n = 20_000
    streams = [Key(0, i).generator().standard_normal(n) for i in range(4)] + [
        Key(0).fold(str(i)).generator().standard_normal(n) for i in range(4)
    ]
    correlation = np.corrcoef(streams) - np.eye(8)
    assert abs(correlation).max() < 4.5 / n**0.5
    firsts = np.array([words(Key(0, i), 1)[0] for i in range(4096)], dtype=np.uint64)
    ones = (firsts[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).sum(0).astype(np.int64)
    assert abs(ones - 2048).max() < 4.5 * 32  # every bit of the first word, over the rounds


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 1000])
def test_a_permutation_is_one(n: int) -> None:
    for i in range(20):
        order = Key(i).permutation(n)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(n))


@pytest.mark.parametrize(("n", "bound"), [(2, 18.0), (3, 28.0), (4, 60.0)])
def test_permutations_are_uniform(n: int, bound: float) -> None:
    # chi-square with n! − 1 degrees of freedom: at most one stream in 20,000 exceeds the bound
    orders = list(itertools.permutations(range(n)))
    counts = dict.fromkeys(orders, 0)
    draws = 250 * len(orders)
    for i in range(draws):
        counts[tuple(Key(7, i).fold("order").permutation(n).tolist())] += 1
    assert sum((count - 250) ** 2 / 250 for count in counts.values()) < bound


def test_every_element_may_come_first() -> None:
    firsts = np.bincount([Key(i).permutation(50)[0] for i in range(5000)], minlength=50)
    assert ((firsts - 100) ** 2 / 100).sum() < 99  # chi-square with 49 degrees of freedom, exceeded once in 30,000


def test_an_integer_is_a_seed_for_anything() -> None:
    draws = [Key(i).integer() for i in range(2000)]
    assert all(isinstance(draw, int) and 0 <= draw < 2**63 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert max(draws) > 2**62
    torch.Generator().manual_seed(max(draws))


def test_no_global_random_state_is_used() -> None:
    def states() -> tuple[object, ...]:
        _, state, place, *_ = np.random.get_state()
        return torch.get_rng_state().numpy().tobytes(), (state.tobytes(), place), random.getstate()

    def everything() -> tuple[object, ...]:
        x = torch.linspace(-1, 1, 500)
        codec = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), threshold=10).bind({"x": spec})
        message = codec.encode({"x": x}, key).message
        decoded, _ = codec.decode(message, key)
        return (
            words(key),
            key.generator().random(5).tolist(),
            key.permutation(10).tolist(),
            key.integer(),
            message,
            decoded["x"].tolist(),
        )

    key, spec = Key(9, 8, 7), TensorSpec((500,), torch.float32)
    before, first = states(), everything()
    assert states() == before
    random.random()
    np.random.rand()
    torch.rand(1)
    moved = states()
    assert moved != before
    assert everything() == first
    assert states() == moved
