"""Sums over a cohort, in an order that no scheduling can change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class PairwiseTree(Generic[T]):
    """Folds values 0, 1, 2, … with `combine` over a fixed binary tree, as they come and in any order.

    Floating-point addition is not associative: over a tree fixed by the values' places the result is the same,
    bit for bit, whoever computed them and whenever. A value may be missing (None): its place stays empty. In order,
    at most log₂(n) + 1 partial results are held.
    """

    def __init__(self, combine: Callable[[T, T], T]) -> None:
        self._combine = combine
        self._waiting: dict[tuple[int, int], T | None] = {}

    def add(self, place: int, value: T | None, level: int = 0) -> None:
        """Takes the value of one place, or a partial result of another tree; each place once."""
        while (level, place ^ 1) in self._waiting:
            sibling = self._waiting.pop((level, place ^ 1))
            value = self._join(value, sibling) if place % 2 == 0 else self._join(sibling, value)
            level, place = level + 1, place // 2
        self._waiting[level, place] = value

    def partial_results(self) -> list[tuple[int, int, T | None]]:
        """Returns (level, place, value) of each partial result: that of places place · 2^level and 2^level − 1 more.

        Of n places in a row at most 2 · log₂(n) are left. Another tree goes on from them with `add`.
        """
        return [(level, place, value) for (level, place), value in self._waiting.items()]

    def result(self) -> T | None:
        """Returns the fold of all values, None without any. Call it once, after all places are taken."""
        total = None
        for _, value in sorted(self._waiting.items(), key=lambda item: item[0]):
            # the smallest subtree is the rightmost: fold the rest from the right
            total = self._join(value, total)
        return total

    def _join(self, left: T | None, right: T | None) -> T | None:
        if left is None or right is None:
            return right if left is None else left
        return self._combine(left, right)


@contextmanager
def one_thread() -> Iterator[None]:
    """Gives the calling thread one intra-op thread: floating sums depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
