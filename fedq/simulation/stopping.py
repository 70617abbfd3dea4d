"""Stops a run on a signal, between two clients."""

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to load
    from fedq.learning.evaluation import Map

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. `exit_code` is the code of the process: 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopping:
    """Turns SIGTERM and Ctrl-C into a request that the run checks after each client. A second signal acts at once.

    Python delivers signals to the main thread alone: in another thread, this context manager does nothing.
    """

    def __init__(self) -> None:
        self._reason: BaseException | None = None

    def request(self, reason: BaseException) -> None:
        """Makes the next `check` raise `reason`. Only the first request counts."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raises the requested exception, if there is one."""
        if self._reason:
            raise self._reason

    def map(self, map: "Map") -> "Map":
        """Returns a function like `map` that checks for requests before each result."""

        def stoppable(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            for result in map(function, items):
                self.check()
                yield result

        return stoppable

    def __enter__(self) -> "Stopping":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._before[number])
        reason = Interrupted(number)
        log.warning("%s: the run stops at the next client; once more, and it stops at once", reason)
        self.request(reason)
