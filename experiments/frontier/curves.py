"""Draws test accuracy over the bytes sent so far, a curve for each run: the picture of README.md.

python -m fedq.train -m encoder=float32,uint8,frontier hydra.sweep.dir=outputs/curves
python -m experiments.frontier.curves outputs/curves --output experiments/frontier/curves.png
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from fedq.compare import MARKERS, bytes_ticks
from fedq.errors import FedqError
from fedq.runs import Run, read_runs
from fedq.tracking.units import human_bytes


def draw(runs: list[Run], path: Path) -> None:
    """Writes a PNG with the curves of `runs`. Each curve ends with the encoder, all bytes and the last accuracy."""
    figure = Figure(figsize=(9, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        accuracy, bits = run.curve("test/accuracy"), run.curve("cumulative_bits")
        axes.plot([bits[done] for done in accuracy], list(accuracy.values()), f"{MARKERS[i]}-", color=f"C{i}", ms=4)
        done, last = list(accuracy.items())[-1]
        text = f"{run.choices['encoder']}\n{human_bytes(bits[done])}\n{last:.1%}"
        axes.annotate(text, (bits[done], last), (0, 8), textcoords="offset points", ha="center", color=f"C{i}")
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=20))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bytes_ticks(axes.xaxis)
    axes.set(xlabel="bytes sent so far, both ways, all clients (logarithmic)", ylabel="test accuracy", ylim=(0, 1.25))
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draws test accuracy over the bytes sent so far.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or folders above them")
    parser.add_argument("--output", type=Path, required=True, metavar="CURVES.png", help="the picture")
    args = parser.parse_args()
    try:
        draw(read_runs(args.runs), args.output)
    except FedqError as error:
        sys.exit(f"fedq: {error}")


if __name__ == "__main__":
    main()
