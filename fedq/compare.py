"""Compares finished runs in a table and a picture.

python -m fedq.compare outputs/DATE/TIME outputs/multirun/DATE/TIME     (installed: fedq-compare …)

Experiments use its parts: `distinguishing_columns`, `table`, `plot`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.measure import Measurement
from rich.table import Table

from fedq.errors import FedqError
from fedq.runs import HOURS, Group, Run, group_by_seed, read_runs
from fedq.tracking.console import stdout_console
from fedq.tracking.units import human_bytes

if TYPE_CHECKING:  # matplotlib takes a second to load, and only pictures need it
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NEVER = "–"
ASSUMED = (
    "Rates are in Mbit/s, latency in ms, compute in GFLOP/s, codec in million parameters a second.\n"
    "Assumed: each client keeps its link, and clients share no link. The server needs no time. Only messages travel: "
    "no headers, losses or slow start. Training is matrix products and convolutions."
)
"""Units of the network's keys, and what the simulated time leaves out."""
LINES, MARKERS = ("-", "--", ":", "-."), "osD^vPX"


def distinguishing_columns(runs: Sequence[Run]) -> list[str]:
    """Returns the groups and the keys that distinguish the runs, such as "encoder" and "client.lr".

    A key that follows from another key (an interpolation) is left out. A key that follows from the choice of a group is
    left out too, unless the command line set the key. If nothing differs, the encoder is returned.
    """

    def differ(some: Sequence[Run], key: str) -> bool:
        values, texts = {repr(run.config.get(key)) for run in some}, {repr(run.written.get(key)) for run in some}
        return len(values) > 1 and len(texts) > 1

    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(repr(sorted(run.choices.items())), []).append(run)
    names = dict.fromkeys(name for run in runs for name in run.choices)
    columns = [name for name in names if len({run.choices.get(name) for run in runs}) > 1]
    for key in dict.fromkeys(key for run in runs for key in run.config):
        given = any(key in run.given for run in runs)
        if any(differ(some, key) for some in ([runs] if given else alike.values())):
            columns.append(key)
    return columns or ["encoder"]


def value(run: Run, column: str) -> str:
    """Returns a run's cell in a column of `distinguishing_columns`, in the syntax of the command line."""
    found = run.choices.get(column) or run.config.get(column, NEVER)
    return found if isinstance(found, str) else json.dumps(found)


def table(groups: Sequence[Group], columns: Sequence[str], target: float) -> list[dict[str, str]]:
    """Returns a row for each group, header → cell: first the distinguishing columns, then the numbers.

    target: the value of the headline metric for the columns "bytes to …" and "rounds to …"; an accuracy is from 0 to 1.
    """
    rows, headline = [], groups[0][0].headline
    for group in groups:
        row = {column: value(group[0], column) for column in columns} | {"runs": str(len(group))}
        for name in ("final", "best"):
            mean, deviation = spread([run.summary[headline.key(name)] for run in group])
            row[f"{name} {headline.words}"] = headline.spread_text(mean, deviation if len(group) > 1 else None)
        for name, total in (("broadcast", "broadcasted"), ("upload", "aggregated")):
            bits, ratio = (fmean(run.summary[key] for run in group) for key in (f"{total}_bits", f"{name}_ratio"))
            row[name] = f"{human_bytes(bits)} {ratio:.2f}×"
        reached = [point for run in group if (point := run.reaches(target))]
        rounds, bits = (fmean(numbers) for numbers in zip(*reached, strict=True)) if reached else (0.0, 0.0)
        timed = [run for run in group if run.network]
        of = f" ({len(reached)} of {len(group)})" if len(group) > 1 else ""
        row[f"bytes to {headline.target_text(target)}"] = human_bytes(bits) if reached else NEVER
        row[f"rounds to {headline.target_text(target)}"] = f"{rounds:.1f}{of}" if reached else NEVER
        if any(run.network for other in groups for run in other):
            hours = [run.metrics[point[0] - 1][HOURS] for run in timed if (point := run.reaches(target))]
            each = [3600 * run.metrics[-1][HOURS] / len(run.metrics) for run in timed]
            row[f"simulated hours to {headline.target_text(target)}"] = f"{fmean(hours):.3g}" if hours else NEVER
            row["simulated s/round"] = f"{fmean(each):.3g}" if each else NEVER
        row["s/round"] = f"{fmean(run.summary['seconds'] / run.summary['rounds'] for run in group):.2f}"
        rows.append(row)
    return rows


def caption(groups: Sequence[Group]) -> str:
    """Returns the networks and the assumptions of the simulated time; "" without simulated time."""
    networks = dict.fromkeys(network for group in groups for run in group if (network := run.network))
    return "\n".join(["simulated time:", *networks, ASSUMED]) if networks else ""


def spread(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation (n − 1), which is 0 for one number."""
    return fmean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0


def show(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Prints the rows as a table without broken cells.

    On a narrow terminal two numbers share a column, or each cell has a line of its own.
    """
    narrow = []
    for row in rows:
        runs, *numbers = [header for header in row if header not in columns]
        pairs = zip(numbers[::2], [*numbers[1::2], runs], strict=True)
        name = "\n".join(f"{column}={row[column]}" for column in columns if row[column] != NEVER)
        narrow.append({"run": name} | {f"{a}\n{b}": f"{row[a]}\n{row[b]}" for a, b in pairs})
    stacked = [{"": header, "run": cell} for row in rows for header, cell in (*row.items(), ("", ""))]
    console = stdout_console()
    for layout in (rows, narrow, stacked):
        shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, leading=int(layout is narrow))
        for header in layout[0]:
            shown.add_column(header, overflow="fold", no_wrap=layout is not stacked)
        for row in layout:
            shown.add_row(*row.values())
        if Measurement.get(console, console.options.update(max_width=10_000), shown).maximum <= console.width:
            break
    console.print(shown)


def plot(axes: "Axes", groups: Sequence[Group], columns: Sequence[str], y: str, x: str = "rounds") -> None:
    """Draws a curve for each group: the mean of metric `y`, with a band of ± one standard deviation.

    x: "rounds" for the rounds done, or the name of a metric.
    """
    from matplotlib import colormaps

    for i, group in enumerate(groups):
        curves = [run.curve(y) for run in group]
        rounds = [done for done in curves[0] if all(done in curve for curve in curves)]
        points = [spread([curve[done] for curve in curves]) for done in rounds]
        places = rounds if x == "rounds" else [fmean(run.curve(x)[done] for run in group) for done in rounds]
        style, marker = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        color = colormaps["viridis"](0.65 * i / max(1, len(groups) - 1))  # also distinct in grey
        shown = [(column, value(group[0], column)) for column in columns]
        name = ", ".join(f"{column}={text}" for column, text in shown if text != NEVER)
        name += f" ({len(group)} runs)" if len(group) > 1 else ""
        step = -(-len(rounds) // 10)
        marks = range(i * step // len(groups), len(rounds), step)
        axes.plot(
            places, [m for m, _ in points], ls=style, marker=marker, markevery=marks, color=color, label=fill(name, 110)
        )
        axes.fill_between(places, [m - d for m, d in points], [m + d for m, d in points], color=color, alpha=0.15, lw=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("rounds done")
    axes.set_ylabel(y.replace("/", " "))


def bytes_ticks(axis: "Axis") -> None:
    """Labels the ticks of an axis of bits as bytes with a unit."""
    axis.set_major_formatter(lambda bits, _: human_bytes(bits).replace(".00", ""))


def save(figure: "Figure", axes: "Axes", path: Path) -> None:
    """Writes the figure as a PNG, with the legend of `axes` below."""
    handles, labels = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.25 * sum(1 + text.count("\n") for text in labels))
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise FedqError(f"{path} cannot be written: {error.strerror}") from error


def draw(groups: Sequence[Group], columns: Sequence[str], target: float, path: Path) -> None:
    """Writes a PNG: the test's headline metric over rounds and over bytes sent.

    If all runs have simulated time, a third panel has the metric over simulated hours.
    """
    from matplotlib.figure import Figure  # not pyplot, which may open a window
    from matplotlib.ticker import LogLocator, NullFormatter

    headline = groups[0][0].headline
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    timed = all(run.network for group in groups for run in group)
    left, right, *others = figure.subplots(1, 3 if timed else 2, sharey=True)
    for axes, x in ((left, "rounds"), (right, "cumulative_bits"), *((axes, HOURS) for axes in others)):
        plot(axes, groups, columns, f"test/{headline.name}", x)
        if any(run.reaches(target) for group in groups for run in group):
            axes.axhline(target, color="black", lw=0.8, ls=(0, (1, 4)), label=f"target {headline.target_text(target)}")
    right.set(xlabel="bytes sent, both ways, all clients", ylabel="")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    bytes_ticks(right.xaxis)
    for axes in others:
        axes.set(xlabel="simulated hours", ylabel="", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    save(figure, left, path)


def target_of(runs: Sequence[Run], target: float | None) -> float:
    """Returns the target of a comparison. Raises FedqError for different headlines, and for an unusable `target`."""
    headline, *others = dict.fromkeys(run.headline for run in runs)
    if others:
        folders = (
            f"test {one.words} in {' '.join(str(run.folder) for run in runs if run.headline == one)}"
            for one in (headline, *others)
        )
        raise FedqError(f"runs of different metrics must be compared separately: {'; '.join(folders)}")
    if target is None:
        worst = max(run.summary[headline.key("final")] for run in runs)
        return 0.95 if headline.more_is_better else worst
    if headline.more_is_better and not 0 < target <= 1:
        raise FedqError(f"--target: {target} is not an accuracy, such as 0.95")
    return target


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("fedq-compare", description="Compares finished runs: a table and a picture.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, a sweep's, or any above")
    words = (
        "test accuracy, or other headline metric, to reach (default: 0.95; if less is better, the worst final value)"
    )
    parser.add_argument("--target", type=float, help=words)
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    try:
        runs = read_runs(args.runs)
        target = target_of(runs, args.target)
        groups = group_by_seed(runs)
        columns = distinguishing_columns([group[0] for group in groups])
        show(table(groups, columns, target), columns)
        print(caption(groups), end="\n" if caption(groups) else "")
        draw(groups, columns, target, args.output)
        print(f"picture in {args.output}")
    except FedqError as error:
        sys.exit(f"fedq: {error}")


if __name__ == "__main__":
    main()
