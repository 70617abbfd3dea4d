"""Sums over a cohort, in an order that no scheduling can change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class PairwiseTree(Generic[T]):
    """Combines values 0, 1, 2, … over a fixed binary tree; they may arrive in any order.

    Floating-point addition is not associative. The tree depends on the values' places alone, so that the result is the
    same, bit for bit, for any number of workers and ranks. A missing value is None. If n values arrive in order, at
    most log₂(n) + 1 partial results are in memory.

    combine: Returns the combination of a left and a right value.
    """

    def __init__(self, combine: Callable[[T, T], T]) -> None:
        self._combine = combine
        self._waiting: dict[tuple[int, int], T | None] = {}

    def add(self, place: int, value: T | None, level: int = 0) -> None:
        """Adds the value of one place, or a partial result of another tree. Each place may be added once."""
        while (level, place ^ 1) in self._waiting:
            sibling = self._waiting.pop((level, place ^ 1))
            value = self._join(value, sibling) if place % 2 == 0 else self._join(sibling, value)
            level, place = level + 1, place // 2
        self._waiting[level, place] = value

    def partial_results(self) -> list[tuple[int, int, T | None]]:
        """Returns (level, place, value) of each partial result, for another tree's `add`.

        A partial result combines 2^level places, from place · 2^level on. A row of n places has at most 2 · log₂(n)
        partial results.
        """
        return [(level, place, value) for (level, place), value in self._waiting.items()]

    def result(self) -> T | None:
        """Returns the combination of all values, or None if there are none. Call it once, after the last `add`."""
        total = None
        for _, value in sorted(self._waiting.items(), key=lambda item: item[0]):
            # the smallest subtree is the rightmost: combine from right to left
            total = self._join(value, total)
        return total

    def _join(self, left: T | None, right: T | None) -> T | None:
        if left is None or right is None:
            return right if left is None else left
        return self._combine(left, right)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one intra-op thread: floating sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
