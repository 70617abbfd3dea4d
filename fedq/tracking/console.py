"""The console: a progress bar on a terminal, otherwise one log line a round; tables without cut cells."""

import logging
import sys
from io import TextIOWrapper
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fedq.tracking.headline import ACCURACY, Headline
from fedq.tracking.metrics import Metrics
from fedq.tracking.units import human_bytes

log = logging.getLogger(__name__)

_WIDE = 110
"""The number of columns from which the text of the progress bar takes one line."""


def stdout_console() -> Console:
    """Returns a console on stdout. Without a terminal, tables get the width that they need.

    A character that the locale lacks becomes a question mark.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000, highlight=False)


class ConsoleProgress:
    """Shows rounds done, loss and headline of training, the last test's headline, and all bytes sent each way."""

    def __init__(self, rounds: int, done: int = 0, headline: Headline = ACCURACY) -> None:
        """Starts the bar of a run.

        rounds: the number of rounds.
        done: the rounds that were done before this process.
        headline: the metric to show.
        """
        self._headline = headline
        console = stdout_console()
        self._separator = ", " if console.width >= _WIDE else "\n"
        self._progress = Progress(
            TextColumn("round {task.completed}/{task.total}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            expand=True,
            console=console,
            disable=not sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("", total=rounds, completed=done)
        self._tested = ""
        self._progress.start()
        self._redirect(sys.stderr)

    def write(self, metrics: Metrics) -> None:
        """Shows one more round."""
        name, short = self._headline.name, self._headline.short
        if f"test/{name}" in metrics:
            sets = [part for part in ("validation", "test") if f"{part}/{name}" in metrics]
            self._tested = "".join(f", {part} {short} {metrics[f'{part}/{name}']:.3f}" for part in sets)
        down, up = (metrics[f"cumulative_{way}_bits"] for way in ("broadcasted", "aggregated"))
        text = self._separator.join(
            (
                f"train loss {metrics['train/loss']:.3f}, train {short} {metrics[f'train/{name}']:.3f}{self._tested}",
                f"{human_bytes(down)} down, {human_bytes(up)} up",
            )
        )
        self._progress.update(self._task, advance=1, description=text)
        if self._progress.disable:
            log.info("round %d: %s, %.2f s", metrics["round"] + 1, text, metrics["seconds"])

    def close(self) -> None:
        """Removes the bar."""
        self._progress.stop()
        self._redirect(sys.stderr)

    @staticmethod
    def _redirect(stream: TextIO) -> None:
        """Sends log lines to `stream`: rich replaces sys.stderr to print them above the bar."""
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(stream)
