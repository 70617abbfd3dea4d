"""Worker threads, which train several clients of one process at the same time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of threads with one intra-op thread each, so that results do not depend on the number of threads.

    Training releases Python's lock nearly all the time. One client a core is faster than one client on all cores.
    """

    def __init__(self, count: int | None = None) -> None:
        """Starts `count` threads. None starts one thread a core; ranks on one machine share the cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count = count or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._pool = ThreadPoolExecutor(self.count, "worker", initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields `function(item)` in order. The pool keeps at most two unread results a worker.

        After an error, no call runs on.
        """
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                if len(pending) > 2 * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            wait([future for future in pending if not future.cancel()])

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
