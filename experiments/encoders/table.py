"""Draws the picture and prints the table of this experiment, from the runs of a sweep.

python -m experiments.encoders.table RUN… --output FIGURE.png > TABLE.md
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from fedq.errors import FedqError
from fedq.runs import Group, find_runs, group_by_seed, read_run, read_runs


def row(group: Group) -> dict[str, str]:
    """Returns the table's row of one encoder; shares of time leave out the first round, which loads."""
    accuracies = [run.summary["final_test_accuracy"] for run in group]
    spread = f" ± {100 * stdev(accuracies):.2f}" if len(group) > 1 else ""
    seconds = {
        phase: sum(line[f"seconds/{phase}"] for run in group for line in run.metrics[1:])
        for phase in ("train", "encode", "decode", "aggregate")
    }
    return {
        "encoder": f"`{_name(group)}`",
        "bits up": f"{_bits(group, 'upload'):.3f}",
        "bits down": f"{_bits(group, 'broadcast'):.3f}",
        "fewer up": f"{fmean(run.summary['upload_ratio'] for run in group):.2f} ×",
        "fewer down": f"{fmean(run.summary['broadcast_ratio'] for run in group):.2f} ×",
        "final accuracy, %": f"{100 * fmean(accuracies):.2f}{spread}",
        "runs": str(len(group)),
        "encode, % of round": f"{100 * seconds['encode'] / sum(seconds.values()):.1f}",
        "decode, % of round": f"{100 * seconds['decode'] / sum(seconds.values()):.1f}",
    }


def _bits(group: Group, way: str) -> float:
    """Returns the bits a parameter of one direction, from the ratio to float32's messages."""
    return fmean(32 / run.summary[f"{way}_ratio"] for run in group)


def figure(groups: list[Group], path: Path) -> None:
    """Draws bits and accuracies side by side, one row an encoder, fewest bits up first."""
    groups = sorted(groups, key=lambda group: -_bits(group, "upload"))
    rows = range(len(groups))
    picture = Figure(figsize=(10, 1 + 0.2 * len(groups)), dpi=110, layout="constrained")
    bits, accuracy = picture.subplots(1, 2, sharey=True)
    for way, colour in (("upload", "tab:blue"), ("broadcast", "tab:orange")):
        bits.plot([_bits(group, way) for group in groups], rows, "o", color=colour, markersize=4, label=way)
    for place, group in enumerate(groups):
        found = [100 * run.summary["final_test_accuracy"] for run in group]
        accuracy.plot(found, [place] * len(found), ".", color="tab:gray", markersize=4)
        accuracy.plot(fmean(found), place, "o", color="tab:green", markersize=4)
    bits.set(xscale="log", xlabel="bits a parameter", yticks=rows, yticklabels=[_name(group) for group in groups])
    bits.tick_params(axis="y", labelsize=8)
    bits.legend()
    accuracy.set(xlabel="final test accuracy, %: each seed, and the mean")
    for axes in (bits, accuracy):
        axes.grid(alpha=0.3)
        axes.margins(y=0.01)
    picture.savefig(path)


def _name(group: Group) -> str:
    """Returns the name of the encoder, with the client if it is not the default."""
    choices = group[0].choices
    return choices["encoder"] + ("" if choices["client"] == "sgd" else f", client={choices['client']}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draws the picture and writes the table, as Markdown, to stdout.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a sweep, or a folder above it")
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png", help="the picture")
    args = parser.parse_args()
    failed = {}
    try:
        groups = sorted(group_by_seed(read_runs(args.runs)), key=_name)
        for folder in find_runs(args.runs):
            try:
                read_run(folder)
            except FedqError as error:
                failed[folder] = str(error)
    except FedqError as error:
        sys.exit(f"fedq: {error}")
    figure(groups, args.output)
    rows = [row(group) for group in groups]
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for cells in rows:
        print("| " + " | ".join(cells.values()) + " |")
    for folder, reason in failed.items():
        print(f"\n- {folder.name} did not finish: {reason}")


if __name__ == "__main__":
    main()
