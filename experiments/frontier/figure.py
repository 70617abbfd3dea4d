"""Accuracy against real bytes: the picture and the table of a sweep's runs.

python -m experiments.frontier.figure RUN… --output FIGURE.png > TABLE.md
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from fedq.compare import NEVER, Group, differences, group_by_seed, read_runs, value
from fedq.errors import FedqError


def bits(group: Group, way: str) -> float:
    """Returns the bits a parameter of one direction, from the ratio to float32's messages."""
    return fmean(32 / run.summary[f"{way}_ratio"] for run in group)


def accuracies(group: Group) -> list[float]:
    """Returns the runs' final test accuracies in per cent."""
    return [100 * run.summary["final_test_accuracy"] for run in group]


def draw(groups: list[Group], names: list[str], path: Path) -> None:
    """Draws bits a parameter, down and up together, and accuracies: the mean, and each seed smaller."""
    picture = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = picture.subplots()
    for group, name in zip(groups, names, strict=True):
        x = bits(group, "broadcast") + bits(group, "upload")
        (mean,) = axes.plot(x, fmean(accuracies(group)), "o", label=name)
        axes.plot([x] * len(group), accuracies(group), ".", color=mean.get_color(), alpha=0.4, markersize=4)
    axes.set(xscale="log", xlabel="bits a parameter, down and up together", ylabel="final test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture.savefig(path)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draws the picture and writes the table, as Markdown, to stdout.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="sweeps' folders, or any above")
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png", help="the picture")
    args = parser.parse_args()
    try:
        runs = read_runs(args.runs)
    except FedqError as error:
        sys.exit(f"fedq: {error}")
    groups = sorted(group_by_seed(runs), key=lambda group: -bits(group, "broadcast") - bits(group, "upload"))
    columns = differences(runs)
    chosen = ({column: value(group[0], column) for column in columns} for group in groups)
    names = [", ".join(text for text in choice.values() if text != NEVER) for choice in chosen]
    draw(groups, names, args.output)
    print(
        "| "
        + " | ".join(columns)
        + " | bits down | bits up | fewer down | fewer up | final accuracy, % | seconds a round |"
    )
    print("|" + "---|" * (len(columns) + 6))
    for group in groups:
        found = accuracies(group)
        spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
        cells = [value(group[0], column) for column in columns]
        cells += [f"{bits(group, way):.4f}" for way in ("broadcast", "upload")]
        cells += [f"{fmean(run.summary[f'{way}_ratio'] for run in group):.0f} ×" for way in ("broadcast", "upload")]
        cells += [f"{fmean(found):.2f}{spread} ({len(found)})"]
        cells += [f"{fmean(run.summary['seconds'] / run.summary['rounds'] for run in group):.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
