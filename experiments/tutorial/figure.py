"""Draws the picture and prints the table of this experiment, from the files of runs.

python -m experiments.tutorial.figure RUN… --output FIGURE.png > TABLE.md
"""

import argparse
import sys
from math import log2
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from fedq.compare import bytes_ticks, distinguishing_columns, plot, save, table
from fedq.errors import FedqError
from fedq.runs import group_by_seed, read_runs

PANELS = {
    "train/loss": "train loss",
    "train/accuracy": "train accuracy",
    "test/accuracy": "test accuracy",
    "cumulative_bits": "bytes sent so far, both ways, all clients",
}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draws the picture and writes the table, as Markdown, to stdout.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a sweep, or a folder above it"
    )
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy to reach (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png", help="the picture")
    args = parser.parse_args()
    try:
        groups = group_by_seed(read_runs(args.runs))
        columns = distinguishing_columns([group[0] for group in groups])
        figure = Figure(figsize=(11, 7.5), dpi=150, layout="constrained")
        for axes, (metric, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
            plot(axes, groups, columns, metric)
            axes.set_ylabel(title)
        # the last panel is linear, because every round sends the same number of bytes
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MultipleLocator(2.0 ** round(log2(axes.get_ylim()[1] / 5))))
        bytes_ticks(axes.yaxis)
        save(figure, axes, args.output)
    except FedqError as error:
        sys.exit(f"fedq: {error}")
    rows = table(groups, columns, args.target)
    for row, group in zip(rows, groups, strict=True):
        for way, total in (("broadcast", "broadcasted_bits"), ("upload", "aggregated_bits")):
            mebibits = fmean(run.summary[total] / run.summary["rounds"] / 2**20 for run in group)
            row[f"{way}, Mibit a round"] = f"{mebibits:.2f}"
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
