"""summary.json: how a run ended, in numbers."""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table

from fedq.files import written_whole
from fedq.tracking.metrics import Metrics
from fedq.tracking.units import human_bytes


class Summary:
    """Gathers what summary.json tells, round by round, so that a run that fails has one too."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's."""
        self._folder = folder
        self._uncompressed_bits = 0
        self.is_ours = True
        self.values: dict[str, Any] = {
            "status": "running",
            "rounds": 0,
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

    def start(self, config: dict[str, Any], uncompressed_bits: int) -> None:
        """Takes in the run's whole configuration and the bits of one message with every tensor exact."""
        self.values |= {"seed": config["run"]["seed"], "config": config}
        self._uncompressed_bits = uncompressed_bits

    def write(self, metrics: Metrics) -> None:
        """Takes in one more round."""
        values = self.values
        values["rounds"] += 1
        values["seconds"] += metrics["seconds"]
        values["broadcasted_bits"] = int(metrics["cumulative_broadcasted_bits"])
        values["aggregated_bits"] = int(metrics["cumulative_aggregated_bits"])
        # what the same clients would have received and sent without an encoder
        clients = int(1 + metrics["repeats"]) * values["config"]["run"]["clients_per_round"]
        values["uncompressed_broadcasted_bits"] += self._uncompressed_bits * clients
        values["uncompressed_aggregated_bits"] += self._uncompressed_bits * int(metrics["uploads"])
        values["broadcast_ratio"] = values["uncompressed_broadcasted_bits"] / values["broadcasted_bits"]
        values["upload_ratio"] = values["uncompressed_aggregated_bits"] / values["aggregated_bits"]
        if "test/accuracy" in metrics:
            values["final_test_accuracy"] = metrics["test/accuracy"]
            values["best_test_accuracy"] = max(values["best_test_accuracy"] or 0.0, metrics["test/accuracy"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes summary.json, whole or not at all; its status is completed, failed or interrupted.

        What did not come to `start` leaves that of another run, which did, in the folder as it is: then it `is_ours`
        no more.
        """
        path = self._folder / "summary.json"
        self.is_ours = self.values["config"] is not None or not _is_of_a_run(path)
        if not self.is_ours:
            return
        # SystemExit: a launcher that takes the job back into its queue
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        status = "completed" if error is None else "interrupted" if stopped else "failed"
        self.values |= {"status": status} | ({"error": str(error)} if error else {})
        with written_whole(path) as file:
            file.write(f"{json.dumps(self.values, indent=2)}\n".encode())

    def __enter__(self) -> "Summary":
        return self

    def print(self) -> None:
        """Prints how the run ended, and the command that shows its curves."""
        values = self.values
        table = Table("", "", title="done", show_header=False, title_justify="left")
        table.columns[1].overflow = "fold"  # a path must stay whole
        final, best = values["final_test_accuracy"], values["best_test_accuracy"]
        table.add_row("test accuracy", f"{final:.2%} (best {best:.2%})" if best is not None else "not tested yet")
        for way, sent, ratio in (("down", "broadcasted", "broadcast"), ("up", "aggregated", "upload")):
            bits, rate = values[f"{sent}_bits"], values[f"{ratio}_ratio"]
            a_round = f"{bits / values['rounds'] / 2**20:,.2f} Mibit a round"
            table.add_row(f"bytes {way}", f"{human_bytes(bits)}, {a_round}, {rate:.2f} x less than float32")
        table.add_row("seconds a round", f"{values['seconds'] / values['rounds']:.2f}")
        table.add_row("output", str(self._folder))
        # every folder of runs is below the nearest one called outputs
        logdir = next((parent for parent in self._folder.parents if parent.name == "outputs"), self._folder)
        table.add_row("curves", f"tensorboard --logdir {logdir}")
        Console(file=sys.stdout).print(table)


def _is_of_a_run(path: Path) -> bool:
    """Tells whether there is a summary of what came to `start`, or one that cannot be read."""
    if not path.exists():
        return False
    try:
        return json.loads(path.read_text())["config"] is not None
    except (ValueError, LookupError, TypeError):
        return True


def _version() -> str | None:
    try:
        return version("fedq")
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Returns the commit of the code that runs, if it is part of a git checkout; "-dirty" if that was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not installed somewhere inside another's checkout
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
