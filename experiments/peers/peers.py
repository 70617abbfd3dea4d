"""Times the same round of federated averaging in fedq, Flower, BlazeFL and pfl.

Each contestant is a process. Peers have virtual environments of their own, which the script makes if they are missing.
All live at once and take turns round by round, so that a drift of the machine's speed affects all alike. Prints the
median seconds a round, and the median of the ratios to fedq's uint8 round of the same turn. `start-up` is the time
from the start of a process to the end of its first round.

python -m experiments.peers.peers --environments FOLDER [--repeats 15] [--blazefl-python python3.13]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter, sleep
from typing import IO

import torch
from rich.table import Table

from experiments.tables import show

HERE = Path(__file__).parent
OWN = ("bare PyTorch", "fedq float32", "fedq uint8")
PEERS = ("flower", "blazefl", "pfl")
WARM_UP = 2


def environment(folder: Path, peer: str, python: str, requirements: Path = HERE) -> Path:
    """Returns the Python of a peer's virtual environment, and makes the environment if it is missing.

    `requirements` is the folder of PEER.txt.
    """
    own, done = folder / peer / "bin" / "python", folder / peer / "complete"
    if not done.exists():
        subprocess.run([python, "-m", "venv", "--clear", folder / peer], check=True)
        # torch first, so that all contestants have the same
        same = f"torch=={torch.__version__.split('+')[0]}"
        subprocess.run([own, "-m", "pip", "install", "--quiet", same], check=True)
        subprocess.run([own, "-m", "pip", "install", "--quiet", same, "-r", requirements / f"{peer}.txt"], check=True)
        done.touch()
    return own


class Contestant:
    """A process that runs a round on request."""

    def __init__(self, name: str, python: Path | str, log: IO[str]) -> None:
        started = perf_counter()
        self.name = name
        module = name if name in PEERS else "own"
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        self._process = subprocess.Popen(
            # not -m: Ray's workers import the module by its name, which must not be __main__
            [python, "-c", f"from experiments.peers.{module} import main; main()", name],
            cwd=HERE.parent.parent,
            env={**os.environ, **quiet, "PYTHONPATH": str(HERE.parent.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.version = self._answer()
        self.start_up = perf_counter() - started

    def round(self) -> float:
        """Runs a round; returns its seconds."""
        assert self._process.stdin
        print("round", file=self._process.stdin, flush=True)
        return float(self._answer())

    def stop(self) -> None:
        """Lets the process end."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended too early: see the end of contestants.log")
        return str(json.loads(line))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the virtual environments")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--blazefl-python", default=sys.executable, help="Python for BlazeFL, 3.12 or later")
    options = parser.parse_args()
    folder: Path = options.environments.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pythons: dict[str, Path | str] = dict.fromkeys(OWN, sys.executable)
    for peer in options.peers:
        pythons[peer] = environment(folder, peer, options.blazefl_python if peer == "blazefl" else sys.executable)
    with (folder / "contestants.log").open("w") as log:
        contestants = [Contestant(name, python, log) for name, python in pythons.items()]
        seconds: dict[str, list[float]] = {name: [] for name in pythons}
        for repeat in range(WARM_UP + options.repeats):
            for contestant in contestants:
                took = contestant.round()
                if not repeat:
                    contestant.start_up += took
                sleep(0.2)  # its threads fall asleep
                if repeat >= WARM_UP:
                    seconds[contestant.name].append(took)
        table = Table(
            "contestant",
            "version",
            "seconds",
            "ratio",
            "min",
            "max",
            "start-up",
            caption="ratio: to fedq uint8; start-up: with the first round",
        )
        for contestant in contestants:
            own = seconds[contestant.name]
            ratio = statistics.median(a / b for a, b in zip(own, seconds["fedq uint8"], strict=True))
            cells = [f"{value:.3f}" for value in (statistics.median(own), ratio, min(own), max(own))]
            table.add_row(contestant.name, contestant.version, *cells, f"{contestant.start_up:.1f} s")
        show(table)
        for contestant in contestants:
            contestant.stop()


if __name__ == "__main__":
    main()
