"""What a person sees while a run goes on: a progress bar on a terminal, else one log line a round."""

import logging
import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fedq.tracking.metrics import Metrics
from fedq.tracking.units import human_bytes

log = logging.getLogger(__name__)


class ConsoleProgress:
    """Shows round, loss, accuracy and the bytes sent each way so far."""

    def __init__(self, rounds: int, done: int = 0) -> None:
        self._progress = Progress(
            TextColumn("round {task.completed}/{task.total}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            # in a narrow window the numbers give way at their end, the rounds and the time stay
            TextColumn("{task.description}", table_column=Column(ratio=8, no_wrap=True, overflow="ellipsis")),
            TimeRemainingColumn(compact=True),
            expand=True,
            console=Console(file=sys.stdout),
            disable=not sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("", total=rounds, completed=done)
        self._tested = ""
        self._progress.start()
        self._redirect(sys.stderr)

    def write(self, metrics: Metrics) -> None:
        """Shows one more round."""
        if "test/accuracy" in metrics:
            self._tested = f" test {metrics['test/accuracy']:.3f}"
        text = (
            f"loss {metrics['train/loss']:.3f} acc {metrics['train/accuracy']:.3f}{self._tested} "
            f"↓{human_bytes(metrics['cumulative_broadcasted_bits'])} "
            f"↑{human_bytes(metrics['cumulative_aggregated_bits'])}"
        )
        self._progress.update(self._task, advance=1, description=text)
        if self._progress.disable:
            log.info("round %d %s %.2f s", metrics["round"], text, metrics["seconds"])

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()
        self._redirect(sys.stderr)

    @staticmethod
    def _redirect(stream: TextIO) -> None:
        """Sends log lines where rich prints them above the bar, and back again."""
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(stream)
