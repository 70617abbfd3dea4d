"""Sums over a cohort, in an order that no scheduling can change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass
class PairwiseTree(Generic[T]):
    """Combines values 0, 1, 2, … over a fixed binary tree; they may arrive in any order.

    Floating-point addition is not associative. The tree depends on the values' places alone, so that the result is the
    same, bit for bit, for any number of workers and ranks. A missing value is None. If n values arrive in order, at
    most log₂(n) + 1 partial results are in memory.

    combine: Returns the combination of a left and a right value.
    waiting: (level, place) → a partial result: the values of 2^level places, from place · 2^level on.
    """

    combine: Callable[[T, T], T]
    waiting: dict[tuple[int, int], T | None] = field(default_factory=dict)

    def add(self, place: int, value: T | None, level: int = 0) -> None:
        """Adds the value of one place, or a partial result of another tree. Each place may be added once."""
        while (level, place ^ 1) in self.waiting:
            sibling = self.waiting.pop((level, place ^ 1))
            if value is not None and sibling is not None:
                value = self.combine(*((value, sibling) if place % 2 == 0 else (sibling, value)))
            else:
                value = sibling if value is None else value
            level, place = level + 1, place // 2
        self.waiting[level, place] = value

    def partial_results(self) -> list[tuple[int, int, T | None]]:
        """Returns (level, place, value) of each partial result, for another tree's `add`.

        A partial result combines 2^level places, from place · 2^level on. A row of n places has at most 2 · log₂(n)
        partial results.
        """
        return [(level, place, value) for (level, place), value in self.waiting.items()]

    def result(self) -> T | None:
        """Returns the combination of all values, or None if there are none. Call it once, after the last `add`."""
        total = None
        for place in sorted(self.waiting):
            # the smallest subtree is the rightmost: combine from right to left
            if (value := self.waiting[place]) is not None:
                total = value if total is None else self.combine(value, total)
        return total


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one intra-op thread: floating sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
