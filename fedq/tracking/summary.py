"""summary.json: how a run ended, in numbers."""

import json
import math
import platform
import shlex
import subprocess
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.table import Table

from fedq.files import written_whole
from fedq.tracking.console import stdout_console
from fedq.tracking.headline import ACCURACY, Headline
from fedq.tracking.metrics import Metrics
from fedq.tracking.units import human_bytes


class Summary:
    """Collects the values of summary.json round by round, so that a failed run also has a summary."""

    def __init__(self, folder: Path) -> None:
        """Starts the summary of the run in `folder`."""
        self._folder = folder
        self._uncompressed_bits = 0
        self._messages = {"broadcasted_bits": 0, "aggregated_bits": 0}
        self.is_ours = True
        self.values: dict[str, Any] = {
            "status": "running",
            "rounds": 0,
            "headline": ACCURACY,
            "final_test_accuracy": None,
            "best_test_accuracy": None,
            "broadcasted_bits": 0,
            "aggregated_bits": 0,
            "uncompressed_broadcasted_bits": 0,
            "uncompressed_aggregated_bits": 0,
            "broadcast_ratio": None,
            "upload_ratio": None,
            "seconds": 0.0,
            "seed": None,
            "config": None,
            "versions": {"python": platform.python_version(), "torch": version("torch"), "fedq": _version()},
            "git_commit": _git_commit(),
        }

    def start(self, config: dict[str, Any], uncompressed_bits: int, headline: Headline = ACCURACY) -> None:
        """Marks the run as begun.

        config: the run's plain configuration.
        uncompressed_bits: bits of one message with every tensor exact.
        headline: the metric whose final and best values the summary has.
        """
        names = {ACCURACY.key(which): headline.key(which) for which in ("final", "best")}
        self.values = {names.get(name, name): value for name, value in self.values.items()}
        self.values |= {"headline": headline, "seed": config["run"]["seed"], "config": config}
        self._uncompressed_bits = uncompressed_bits

    def write(self, metrics: Metrics) -> None:
        """Adds one more round. Metrics without a place in the summary are ignored."""
        values = self.values
        values["rounds"] += 1
        values["seconds"] += metrics["seconds"]
        values["broadcasted_bits"] = int(metrics["cumulative_broadcasted_bits"])
        values["aggregated_bits"] = int(metrics["cumulative_aggregated_bits"])
        if "cumulative_reported_bits" in metrics:
            values["reported_bits"] = int(metrics["cumulative_reported_bits"])
        # bits that the same clients would have received and sent without an encoder
        run = values["config"]["run"]
        asked = run["clients_per_round"] + (run.get("network") or {}).get("over_selection", 0)
        self._messages["broadcasted_bits"] += int(1 + metrics["repeats"]) * asked
        self._messages["aggregated_bits"] += int(metrics["uploads"])
        for total, ratio in (("broadcasted_bits", "broadcast_ratio"), ("aggregated_bits", "upload_ratio")):
            values[f"uncompressed_{total}"] = self._uncompressed_bits * self._messages[total]
            values[ratio] = values[f"uncompressed_{total}"] / values[total]
        headline = Headline.of(values)
        tested = metrics.get(f"test/{headline.name}")
        if tested is not None:
            final, best = headline.key("final"), headline.key("best")
            values[final] = tested if math.isfinite(tested) else None
            known = [value for value in (values[best], values[final]) if value is not None]
            values[best] = headline.best(known) if known else None

    def __enter__(self) -> "Summary":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes summary.json, completely or not at all; its status is completed, failed or interrupted.

        A run that fails before `start` does not overwrite an earlier run's summary; `is_ours` is then false. Raises
        OSError if the file cannot be written and the run has no other error.
        """
        path = self._folder / "summary.json"
        self.is_ours = self.values["config"] is not None or not _is_of_a_run(path)
        if not self.is_ours:
            return
        # a launcher raises SystemExit to put the job back into its queue
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        status = "completed" if error is None else "interrupted" if stopped else "failed"
        self.values |= {"status": status} | ({"error": str(error)} if error else {})
        with suppress(OSError) if error else nullcontext(), written_whole(path) as file:
            file.write(f"{json.dumps(self.values, indent=2)}\n".encode())

    def print(self) -> None:
        """Prints how the run ended, and the commands that show its curves and export its model."""
        values = self.values
        table = Table("", "", title="done", show_header=False, title_justify="left")
        headline = Headline.of(values)
        final, best = (values[headline.key(which)] for which in ("final", "best"))
        text = "not tested yet" if best is None else f"{headline.text(final)} (best {headline.text(best)})"
        table.add_row(f"test {headline.words}", text)
        if (chosen := values.get("selection")) and chosen["best"] is not None:
            after = f"after round {chosen['round']}"
            final, best, test = (headline.text(chosen[name]) for name in ("final", "best", "test"))
            table.add_row(f"{chosen['set']} {headline.words}", f"{final} (best {best} {after})")
            table.add_row(f"test {after}", test)
        for way, total, ratio in (("down", "broadcasted_bits", "broadcast"), ("up", "aggregated_bits", "upload")):
            rate = f"{values[f'{ratio}_ratio']:.2f} x less than uncompressed"
            table.add_row(f"bytes {way}", f"{human_bytes(values[total])}, {rate}")
        down, up = (human_bytes(values[total] / messages) for total, messages in self._messages.items())
        table.add_row("bytes a client a round", f"{down} down, {up} up")
        if "reported_bits" in values:
            table.add_row("bytes of reports", human_bytes(values["reported_bits"]))
        table.add_row("seconds a round", f"{values['seconds'] / values['rounds']:.2f}")
        stdout_console().print(table)
        # all folders of runs are below the nearest folder called outputs
        logdir = next((parent for parent in self._folder.parents if parent.name == "outputs"), self._folder)
        # outside the table, so that a terminal that folds these lines still copies them completely
        print(f"output: {self._folder}\ncurves: tensorboard --logdir {shlex.quote(str(logdir))}")
        print(f"model: python -m fedq.export {shlex.quote(str(self._folder))} --to model")


def _is_of_a_run(path: Path) -> bool:
    """Returns whether `path` is the summary of a run that reached `start`, or an unreadable file."""
    if not path.exists():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"] is not None
    except (ValueError, LookupError, TypeError):
        return True


def _version() -> str | None:
    try:
        return version("fedq")
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Returns the commit of the running code, with "-dirty" after changes, or None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fedq may lie in another checkout
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
