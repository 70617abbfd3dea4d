import itertools
import random

import pytest

from fedq.learning.aggregation import PairwiseTree


def joined(a: str, b: str) -> str:
    return f"({a}{b})"


def fold(values: list[str | None], order: list[int]) -> str | None:
    tree: PairwiseTree[str] = PairwiseTree(joined)
    for place in order:
        tree.add(place, values[place])
    return tree.result()


def test_the_tree_is_the_one_of_pairs_of_pairs() -> None:
    assert fold(list("abcd"), [0, 1, 2, 3]) == "((ab)(cd))"
    assert fold(list("abcdefg"), list(range(7))) == "(((ab)(cd))((ef)g))"


@pytest.mark.parametrize("n", range(1, 7))
def test_the_order_of_arrival_does_not_matter(n: int) -> None:
    values = list("abcdef"[:n])
    results = {fold(values, list(order)) for order in itertools.permutations(range(n))}
    assert len(results) == 1


def test_a_missing_value_leaves_its_place_empty() -> None:
    values = ["a", None, "c", None, None, "f"]
    for order in itertools.permutations(range(6)):
        assert fold(values, list(order)) == "((ac)f)"
    assert fold([None, None], [1, 0]) is None
    assert fold([], []) is None


def test_in_order_few_partial_sums_are_held() -> None:
    tree: PairwiseTree[int] = PairwiseTree(int.__add__)
    most = 0
    for place in range(1000):
        tree.add(place, place)
        most = max(most, len(tree.waiting))
    assert most <= 10
    assert tree.result() == 999 * 1000 // 2


def test_floating_sums_are_bit_equal_in_any_order() -> None:
    rng = random.Random(0)
    values = [rng.uniform(-1, 1) * 10 ** rng.randint(-8, 8) for _ in range(100)]
    sums = set()
    for _ in range(20):
        tree: PairwiseTree[float] = PairwiseTree(float.__add__)
        for place in rng.sample(range(100), 100):
            tree.add(place, values[place])
        sums.add(tree.result())
    assert len(sums) == 1
    assert len({sum(rng.sample(values, 100)) for _ in range(20)}) > 1  # a plain sum depends on the order
