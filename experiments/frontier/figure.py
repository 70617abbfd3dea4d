"""Accuracy against bytes: draws the picture and prints the table of all runs so far.

python -m experiments.frontier.figure [RUN…] --output FIGURE.png > TABLE.md

RUN… are folders of sweeps, or folders above them. The command adds their runs to results.csv in the folder of this
file. A row has all seeds of one scheme on one dataset. A new row replaces an earlier row of the same scheme, unless the
earlier row has more runs. Picture and table show all rows. Bits are bits a parameter, of the messages of all clients
and rounds.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedq.errors import FedqError
from fedq.runs import IGNORED, Group, Run, read_runs

RESULTS = Path(__file__).with_name("results.csv")
DATASETS = {"mnist5k": "mnist5k", "writers": "writers, drawn", "emnist_digits": "120 real writers"}
NAMED = ("float32", "uint8", "drive", "eden_half", "powersgd", "stc", "bit_budget", "follow_loss", "frontier")
CLAIMS = {"TFF's tutorial: 3.5 ×": 2 * 32 / 3.5, "Caldas 2018: 14 ×, 28 ×": 32 / 14 + 32 / 28}
# keys that do not change the scheme; dataset, rounds and scheme are a row's key
_SAME = tuple(f"{key}=" for key in (*IGNORED, "run.evaluate_every", "run.rounds", "dataset"))

Key = tuple[str, int, str]  # dataset, rounds, scheme


@dataclass(frozen=True)
class Result:
    """The runs of one scheme on one dataset. None if unknown, or if there is only one run."""

    dataset: str
    rounds: int
    scheme: str
    runs: int
    down: float  # bits a parameter
    up: float  # bits a parameter
    accuracy: float  # mean, per cent
    spread: float | None  # standard deviation, per cent
    encode: float | None  # per cent of a round's time without evaluation
    decode: float | None
    commit: str  # commits that ran the runs, joined by +

    @property
    def key(self) -> Key:
        """Identifies a row of results.csv."""
        return self.dataset, self.rounds, self.scheme

    @property
    def both(self) -> float:
        """Bits a parameter, down and up together."""
        return self.down + self.up


def scheme(overrides: list[str]) -> str:
    """Returns the encoder and the other overrides of a command that change a result, as one name."""
    ordered = sorted(overrides, key=lambda override: (not override.startswith("encoder="), override))
    return ",".join(o.removeprefix("encoder=") for o in ordered if not o.startswith(_SAME))


def by_row(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """Returns the runs of each row; `run.evaluate_every` may differ within a row.

    Raises FedqError if a row would have a seed twice, or two configurations.
    """
    found: dict[Key, list[Run]] = {}
    for run in runs:
        name = scheme(yaml.safe_load((run.folder / ".hydra/overrides.yaml").read_text()))
        row = found.setdefault((run.choices["dataset"], run.summary["rounds"], name), [])
        for other in row:
            pair = f"{other.folder} and {run.folder} would stand in one row ({name} on {run.choices['dataset']})"
            if run.summary["seed"] == other.summary["seed"]:
                raise FedqError(f"{pair} with the same seed, {run.summary['seed']}: give one of them")
            unlike = [key for key in run.config if other.config.get(key, run.config[key]) != run.config[key]]
            if set(unlike) - {"run.evaluate_every"}:
                raise FedqError(f"{pair}, but differ in {', '.join(unlike)}: give one of them")
        row.append(run)
    return found


def result(key: Key, group: Group) -> Result:
    """Returns the row of some runs."""
    accuracies = [100 * run.summary["final_test_accuracy"] for run in group]
    down, up = (fmean(32 / run.summary[f"{way}_ratio"] for run in group) for way in ("broadcast", "upload"))
    seconds = {  # the first round loads, and is left out
        phase: sum(line[f"seconds/{phase}"] for run in group for line in run.metrics[1:])
        for phase in ("train", "encode", "decode", "aggregate")
    }
    commits = (re.sub(r"(?<=^.{7})[0-9a-f]+", "", str(run.summary["git_commit"])) for run in group)
    return Result(
        *key,
        len(group),
        round(down, 4),
        round(up, 4),
        round(fmean(accuracies), 2),
        round(stdev(accuracies), 2) if len(group) > 1 else None,
        round(100 * seconds["encode"] / sum(seconds.values()), 1),
        round(100 * seconds["decode"] / sum(seconds.values()), 1),
        "+".join(dict.fromkeys(commits)),
    )


def load() -> list[Result]:
    """Returns the rows of results.csv."""
    read: dict[str, Any] = {"dataset": str, "rounds": int, "scheme": str, "runs": int, "commit": str}
    with RESULTS.open(newline="") as file:
        texts = list(csv.DictReader(file))
    rows: list[dict[str, Any]] = [
        {name: read.get(name, float)(text) if text else None for name, text in row.items()} for row in texts
    ]
    return [Result(**row) for row in rows]


def add(results: Mapping[Key, Result], new: Iterable[Result], fewer: bool = False) -> dict[Key, Result]:
    """Returns the results, with each new result in place of the result of the same key.

    Raises FedqError if a new result has fewer runs than the one that it would replace, unless `fewer` is true.
    """
    added = dict(results)
    for one in new:
        if (old := results.get(one.key)) and one.runs < old.runs and not fewer:
            row = f"{one.scheme} on {one.dataset} after {one.rounds} rounds"
            raise FedqError(f"{row} has {old.runs} runs in {RESULTS.name}, not {one.runs}: give all seeds, or --fewer")
        added[one.key] = one
    return added


def save(results: list[Result]) -> None:
    """Writes results.csv."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, results))


def draw(results: list[Result], path: Path) -> None:
    """Draws bits and accuracies, one panel a dataset: means, and standard deviations over seeds as bars."""
    shown = [name for name in DATASETS if any(one.dataset == name for one in results)]
    picture = Figure(figsize=(4.6 * len(shown), 4.8), dpi=110, layout="constrained")
    panels = picture.subplots(1, len(shown), squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        _panel(axes, [one for one in results if one.dataset == name])
        axes.set(xscale="log", xlabel="bits a parameter, down and up together", title=DATASETS[name])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("final test accuracy, %")
    labels = {label: mark for axes in panels for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    picture.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5, fontsize=8)
    picture.savefig(path)


def _panel(axes: Axes, results: list[Result]) -> None:
    best = {
        rounds: max(one.accuracy for one in results if one.rounds == rounds) for rounds in {r.rounds for r in results}
    }
    axes.set_ylim(min(best.values()) - 5, max(best.values()) + 1.3)
    for claim, style in zip(CLAIMS, ("--", ":"), strict=True):
        axes.axvline(CLAIMS[claim], color="tab:gray", linestyle=style, linewidth=1, label=f"claimed by {claim}")
    for one in results:
        base, *rest = one.scheme.split(",")
        named = base in NAMED and not rest
        colour = ("black" if base == "frontier" else f"C{NAMED.index(base)}") if named else "silver"
        default = one.rounds == 60
        label = base if named and default else f"{base}, {one.rounds} rounds" if named else "all others, in results.csv"
        axes.errorbar(
            one.both,
            one.accuracy,
            one.spread or 0,
            fmt="o" if default and named else "s" if named else ".",
            color=colour,
            fillstyle="full" if default else "none",
            zorder=3 if named else 2,
            label=label,
        )


def table(results: list[Result]) -> str:
    """Returns a Markdown table of all encoders without overrides: a row an encoder, a column a dataset."""
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for one in results:
        if "," not in one.scheme:
            spread = "" if one.spread is None else f" ± {one.spread:.2f}"
            fewer = " and ".join(
                f"{32 / bits:.3g}" if bits > 0.32 else f"{32 / bits:.0f}" for bits in (one.down, one.up)
            )
            text = f"{one.accuracy:.2f}{spread}, {fewer} ×"
            cells.setdefault((one.scheme, one.rounds), {})[one.dataset] = text
    lines = [["encoder", "rounds", *DATASETS.values()], ["---"] * (2 + len(DATASETS))]
    lines += [
        [f"`{scheme}`", str(rounds), *(row.get(name, "") for name in DATASETS)]
        for (scheme, rounds), row in cells.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draws the picture and writes the table, as Markdown, to stdout.")
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folders of sweeps to add, or folders above them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png", help="the picture")
    parser.add_argument("--fewer", action="store_true", help="allow rows of fewer runs to replace rows of more")
    args = parser.parse_args()
    results = {one.key: one for one in load()}
    try:
        new = by_row(read_runs(args.runs)) if args.runs else {}
        results = add(results, (result(key, group) for key, group in new.items()), args.fewer)
    except FedqError as error:
        sys.exit(f"fedq: {error}")
    ordered = sorted(results.values(), key=lambda one: (list(DATASETS).index(one.dataset), one.rounds, -one.both))
    save(ordered)
    draw(ordered, args.output)
    print(table(ordered))


if __name__ == "__main__":
    main()
