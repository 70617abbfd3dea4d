"""A sweep: checks all jobs before the first one starts, and reports failed jobs at the end."""

import json
import math
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from fedq.config import ConfigError, check, explain, to_container
from fedq.config_check import overridden
from fedq.config_differences import config_differences
from fedq.files import written_whole
from fedq.simulation.earlier import in_short
from fedq.tracking.headline import Headline
from fedq.tracking.units import human_bytes

_JOBS = ".jobs"
"""Subfolder of a sweep's folder.

A file there has a job's number as its name, and holds the folder of the job's results.
"""


_VARIED = "varied"
"""File in this subfolder that lists the keys and groups that the sweep varies."""


def varied_keys() -> set[str]:
    """Returns the keys that the command line sets; in a sweep, the keys that differ between jobs."""
    config = HydraConfig.get()
    if config.mode == RunMode.RUN:
        return overridden(config.overrides.task)
    return set(Path(config.sweep.dir, _JOBS, _VARIED).read_text(encoding="utf-8").splitlines())


def objective(summary: Mapping[str, Any], floor: float | None) -> float:
    """Returns the value that a search minimises: all bits that a completed run sent, both ways.

    A run whose final accuracy, or other headline metric, is worse than `floor` gets a larger value than any number of
    bits. The value grows with the distance from the floor: Deb 2000, section 3, orders solutions that break a
    constraint this way.

    summary: the run's summary.json.
    floor: the worst value of the headline metric that is allowed, None for no floor.
    """
    headline, (final, _) = Headline.of(summary), chosen_by(summary)
    if floor is not None and (final is None or not headline.reaches(final, floor)):
        return 1e30 * (1 + (math.inf if final is None else abs(floor - final)))
    return float(summary["broadcasted_bits"] + summary["aggregated_bits"])


def chosen_by(summary: Mapping[str, Any]) -> tuple[float | None, str]:
    """Returns the final headline by which a search chooses, and its set: "validation" if the run has it, or "test"."""
    selection = summary.get("selection") or {"final": summary[Headline.of(summary).key("final")], "set": "test"}
    return selection["final"], selection["set"]


def register(folder: Path) -> None:
    """Records that the results of this job are in `folder`. Does nothing outside a sweep.

    The record is a file, because a launcher may run the job in another process.
    """
    config = HydraConfig.get()
    if config.mode == RunMode.MULTIRUN:
        notes = Path(config.sweep.dir, _JOBS)
        notes.mkdir(parents=True, exist_ok=True)
        with written_whole(notes / f"{config.job.num}") as file:
            file.write(str(folder).encode("utf-8", "surrogateescape"))


class CheckSweep(Callback):
    """Checks every job at the start of a sweep, so that a typo in the last job shows at once."""

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program with one line if a job's configuration is wrong, or if its folder holds another run."""
        numbered = config.hydra.sweeper._target_.endswith(".BasicSweeper")  # other sweepers draw jobs one by one
        if not numbered and OmegaConf.select(config, "run.accuracy_floor") is None:
            # Hydra turns a callback's exceptions into warnings, except for SystemExit
            raise SystemExit("fedq: a search needs a required accuracy: set run.accuracy_floor, such as 0.9")
        loader = GlobalHydra.instance().config_loader()
        parser = OverridesParser.create(loader)
        params = [f"{key}={value}" for key, value in (OmegaConf.select(config, "hydra.sweeper.params") or {}).items()]
        overrides = parser.parse_overrides([*params, *config.hydra.overrides.task])
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([_with_ends(one) for one in overrides]), None)
        for number, job in enumerate(jobs):
            try:
                cfg = loader.load_sweep_config(config, list(job))
                check(cfg, job)
                with open_dict(cfg):
                    cfg.hydra.job.num = cfg.hydra.job.id = number
                folder = Path(config.hydra.sweep.dir, str(cfg.hydra.sweep.subdir))
                differing = _differences(folder, cfg) if numbered else []
            except ConfigError as error:
                raise SystemExit(f"fedq: {' '.join(job)}: {error}") from error
            except (HydraException, OmegaConfBaseException) as error:
                raise SystemExit(f"fedq: {' '.join(job)}: {explain(error)}") from error
            if differing:
                raise SystemExit(
                    f"fedq: {folder} holds another run: {in_short(differing)}; "
                    "give the sweep that made it, or another hydra.sweep.dir"
                )
        notes = Path(config.hydra.sweep.dir, _JOBS)
        shutil.rmtree(notes, ignore_errors=True)  # records of an earlier sweep in this folder
        notes.mkdir(parents=True)
        varied = [str(one.get_key_element()) for one in overrides if one.is_sweep_override()]
        (notes / _VARIED).write_text("\n".join(varied), encoding="utf-8")

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints which job has the fewest bits at the accuracy floor, if `run.accuracy_floor` is set.

        Ends the program with a list of the failed jobs, if a job failed. Hydra itself reports only the first one.
        """
        notes = [note for note in Path(config.hydra.sweep.dir, _JOBS).glob("*") if note.name.isdigit()]
        notes.sort(key=lambda note: int(note.name))
        folders = dict.fromkeys(Path(note.read_bytes().decode("utf-8", "surrogateescape")) for note in notes)
        summaries = {folder: _summary(folder) for folder in folders}
        completed = {folder: summary for folder, summary in summaries.items() if summary["status"] == "completed"}
        floor = OmegaConf.select(config, "run.accuracy_floor")
        if floor is not None and completed:
            print(_fewest_bits(completed, floor, list(config.hydra.overrides.task)))
        failed = [f"  {folder}: {summaries[folder]['error']}" for folder in summaries if folder not in completed]
        if failed:
            raise SystemExit("\n".join(["fedq: these jobs of the sweep failed, the others are done:", *failed]))


def _summary(folder: Path) -> dict[str, Any]:
    """Returns a job's summary. A job without a summary, for example after a kill, has failed."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return {"error": summary["status"], **summary}
    except (OSError, ValueError, LookupError, TypeError) as error:
        return {"status": "failed", "error": f"summary.json cannot be read: {error}"}


def _with_ends(override: Override) -> str:
    """Returns an override as text. An interval becomes a choice of its two ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start},{value.end}"
    return str(override.input_line)


def _differences(folder: Path, cfg: DictConfig) -> list[str]:
    """Returns how the configuration stored in a job's folder, if any, differs from the job's configuration now."""
    path = folder / ".hydra" / "config.yaml"
    there = OmegaConf.load(path) if path.exists() else None
    if not isinstance(there, DictConfig):
        return []
    return config_differences(
        to_container(there), to_container(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    )


def _fewest_bits(summaries: Mapping[Path, Mapping[str, Any]], floor: float, given: list[str]) -> str:
    """Returns a sentence that names the completed job with the fewest bits at or above the floor."""
    folder, best = min(summaries.items(), key=lambda item: objective(item[1], floor))
    overrides = map(str, OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    job = " ".join([shlex.join(override for override in overrides if override not in given), "in", str(folder)])
    headline, (final, examples) = Headline.of(best), chosen_by(best)
    at, reached = f"{examples} {headline.words} of {headline.text(floor)}", headline.text(final)
    if examples != "test":
        reached += f" (test {headline.text(best[headline.key('final')])})"
    if final is None or not headline.reaches(final, floor):
        return f"no job reached a {at}; nearest is {job}, with {reached}"
    size = human_bytes(best["broadcasted_bits"] + best["aggregated_bits"])
    rate = 32 / best["broadcast_ratio"] + 32 / best["upload_ratio"]
    return (
        f"fewest bits at a {at} or {'more' if headline.more_is_better else 'less'}: {job}, with {size} both ways, "
        f"{rate:.2f} bits a parameter down and up together, at {reached}"
    )
