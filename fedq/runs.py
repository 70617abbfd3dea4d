"""Reads completed runs from their folders."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedq.config import CHANGES_NOTHING, flatten
from fedq.errors import FedqError
from fedq.tracking.headline import Headline

IGNORED = ("run.seed", "dataset.path", *CHANGES_NOTHING)
"""Keys in which runs of one experiment may differ: the seed, a dataset's folder, and keys without effect."""
HOURS = "simulated_hours"
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """A completed run, as read from its folder.

    folder: the run's folder.
    choices: group → choice, such as "encoder" → "uint8".
    config: key → value, such as "encoder.bits" → 8. Keys of IGNORED, and keys that refer to them, are None.
    written: key → value before interpolation, such as "encoder.broadcast.bits" → "${encoder.bits}".
    given: the keys that the command line set.
    metrics: for each round the metrics of metrics.jsonl, and `cumulative_bits`, the bits sent both ways so far. With
        `run.network` also the simulated hours so far.
    summary: summary.json.
    """

    folder: Path
    choices: dict[str, str]
    config: dict[str, Any]
    written: dict[str, Any]
    given: frozenset[str]
    metrics: list[dict[str, float]]
    summary: dict[str, Any]

    @property
    def identity(self) -> str:
        """Text that is equal for runs that differ only in IGNORED."""
        return repr((sorted(self.choices.items()), sorted(self.config.items())))

    def curve(self, name: str) -> dict[int, float]:
        """Returns rounds done → value of a metric, for the rounds that have the metric."""
        return {done: values[name] for done, values in enumerate(self.metrics, start=1) if name in values}

    @property
    def headline(self) -> Headline:
        """The metric by which the run is compared."""
        return Headline.of(self.summary)

    def reaches(self, target: float) -> tuple[int, float] | None:
        """Returns the rounds done and the bits sent both ways at the first test that reached the target."""
        tests, reached = self.curve(f"test/{self.headline.name}"), self.headline.reaches
        done = next((done for done, value in tests.items() if reached(value, target)), None)
        return None if done is None else (done, self.metrics[done - 1]["cumulative_bits"])

    @property
    def network(self) -> str | None:
        """The network of the simulated time, with its keys; None without simulated time."""
        if HOURS not in self.metrics[-1]:
            return None
        parts = [(key.rpartition("."), value) for key, value in self.config.items() if value is not None]
        keys = [f"{key}={value}" for (node, _, key), value in parts if node == "run.network" and key != "_target_"]
        return f"{self.choices['run/network']}: {', '.join(keys)}"


Group = Sequence[Run]
"""Runs that differ only in IGNORED."""


def read_run(folder: Path) -> Run:
    """Reads a run's folder. Raises FedqError with the reason if the run is unfinished or its files disagree."""
    if not (folder / "summary.json").exists() and not (folder / "metrics.jsonl").exists():
        raise FedqError("unfinished: the run did not begin")
    summary = _read(folder / "summary.json", json.loads, "unfinished")
    try:
        if summary["status"] != "completed":
            raise FedqError(" ".join(f"unfinished: {summary['status']} {summary.get('error', '')}".split()))
        hydra = _read(folder / ".hydra/hydra.yaml", lambda text: yaml.load(text, _YAML))["hydra"]
        choices = {g: str(choice) for g, choice in hydra["runtime"]["choices"].items() if not g.startswith("hydra/")}
        given = {override.lstrip("+~").split("=")[0] for override in hydra["overrides"]["task"]}
        config, written = _read(folder / ".hydra/config.yaml", _configs)
        metrics = _read(folder / "metrics.jsonl", lambda text: [json.loads(line) for line in text.splitlines()])
        _check(metrics, summary, config)
        for line in metrics:
            line["cumulative_bits"] = line["cumulative_broadcasted_bits"] + line["cumulative_aggregated_bits"]
            if "cumulative_simulated_seconds" in line:
                line[HOURS] = line["cumulative_simulated_seconds"] / 3600
    except (AttributeError, KeyError, TypeError) as error:
        raise FedqError(f"damaged: its files lack a value ({type(error).__name__}: {error})") from error
    return Run(folder, choices, config, written, frozenset(given - set(choices)), metrics, summary)


def _read(path: Path, parse: Callable[[str], Any], missing: str = "damaged") -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FedqError(f"{missing}: it has no {path.name}") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise FedqError(f"damaged: {path.name} cannot be read: {' '.join(str(error).split())}") from error


def _configs(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields `config` and `written` of a Run, from the text of config.yaml."""
    cfg = OmegaConf.create(text)
    written = dict(flatten(OmegaConf.to_container(cfg)))
    for key in set(IGNORED) & set(written):
        OmegaConf.update(cfg, key, None)
    return dict(flatten(OmegaConf.to_container(cfg, resolve=True))), written


def _check(metrics: Sequence[Mapping[str, float]], summary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises FedqError unless metrics.jsonl has every round, and adds up to the totals of summary.json."""
    numbers, rounds = [line["round"] for line in metrics], config["run.rounds"]
    if not numbers or numbers != list(range(rounds)) or len(numbers) != summary["rounds"]:
        counts = f"{len(numbers)} lines; of {rounds} rounds, summary.json has {summary['rounds']}"
        raise FedqError(f"damaged: metrics.jsonl must have each round once ({counts})")
    for sent, total in (("broadcast_bits", "broadcasted_bits"), ("aggregated_bits", "aggregated_bits")):
        sums = [line[f"cumulative_{total}"] for line in metrics]
        if sums != list(accumulate(line[sent] for line in metrics)) or sums[-1] != summary[total]:
            raise FedqError(f"damaged: {sent} and cumulative_{total} of metrics.jsonl and summary.json do not agree")
    headline = Headline.of(summary)
    tested = [line[name] for line in metrics if (name := f"test/{headline.name}") in line]
    if None in tested:
        raise FedqError(f"diverged: a test/{headline.name} of metrics.jsonl is not finite")
    if not tested or (tested[-1], headline.best(tested)) != tuple(summary[headline.key(n)] for n in ("final", "best")):
        raise FedqError(f"damaged: test/{headline.name} of metrics.jsonl and summary.json do not agree")
    for key in ("broadcast_ratio", "upload_ratio", "seconds", "seed"):
        if not isinstance(summary[key], int | float):
            raise FedqError(f"damaged: {key} of summary.json is {summary[key]!r}, not a number")


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Returns the folders of runs at or below `folders`, each once. Raises FedqError for a folder that is missing."""
    folder_of: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FedqError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
        for path, below, files in os.walk(folder):
            run = Path(path)
            if {"metrics.jsonl", "summary.json"} & set(files) or (run / ".hydra/config.yaml").exists():
                folder_of.setdefault(run.resolve(), run)
                below.clear()
            below.sort(key=lambda name: (len(name) * name.isdigit(), name))  # job 10 of a sweep comes after job 9
    return list(folder_of.values())


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Reads every completed run at or below `folders`. For each ignored run, a line on stderr gives the reason.

    If several runs have the same configuration and seed, the last one counts. Raises FedqError if no run is left.
    """
    runs: dict[tuple[str, int], Run] = {}
    folders = list(folders)
    for folder in find_runs(folders):
        try:
            run = read_run(folder)
        except FedqError as error:
            print(f"fedq: left out {folder}: {error}", file=sys.stderr)
            continue
        key = run.identity, run.summary["seed"]
        if key in runs:
            print(f"fedq: left out {runs[key].folder}: same configuration and seed as {folder}", file=sys.stderr)
        runs[key] = run
    if not runs:
        raise FedqError(f"no completed run in {', '.join(map(str, folders))}")
    return list(runs.values())


def group_by_seed(runs: Iterable[Run]) -> list[Group]:
    """Returns the runs in groups whose members differ only in IGNORED, in the order of each group's first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.identity, []).append(run)
    return list(groups.values())
