"""Stopping a run from outside, between two clients."""

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
    """A signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopping:
    """SIGTERM and Ctrl-C as a wish that the run looks for after each client; a second one is obeyed at once.

    Signals come to the main thread alone: in another this does nothing.
    """

    def __init__(self) -> None:
        self._reason: BaseException | None = None

    def request(self, reason: BaseException) -> None:
        """Has the next `check` raise `reason`."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raises what was requested, if anything was."""
        if self._reason:
            raise self._reason

    def map(self, map: "Map") -> "Map":
        """Returns `map` with a check before each result."""

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
