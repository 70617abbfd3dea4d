"""A sweep is checked whole before its first job starts, and says at its end what came of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedq.config import ConfigError, check, differences, explain, plain
from fedq.tracking.units import human_bytes


def objective(summary: Mapping[str, Any], floor: float | None) -> float:
    """Returns what a search minimises: all bits that a completed run sent, both ways.

    A run whose final test accuracy is below `floor` counts for more than any bits, and the more the further it is
    below: the order that Deb 2000, section 3, gives to solutions that break a constraint.
    """
    accuracy = float(summary["final_test_accuracy"])
    if floor is not None and accuracy < floor:
        return 1e30 * (1 + floor - accuracy)
    return float(summary["broadcasted_bits"] + summary["aggregated_bits"])


class CheckSweep(Callback):
    """Composes and checks every job of a sweep when it starts: a typo in the last job must not wait for the first."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program with one line where a job's configuration is wrong, or its folder holds another run."""
        numbered = config.hydra.sweeper._target_.endswith(".BasicSweeper")  # another one draws as it goes
        if not numbered and OmegaConf.select(config, "run.accuracy_floor") is None:
            # Hydra turns a callback's exceptions into warnings, but lets this one pass
            raise SystemExit("fedq: a search needs the test accuracy to hold: set run.accuracy_floor, such as 0.9")
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
                    f"fedq: {folder} holds another run: {differing[0]}; "
                    "give the sweep that made it, or another hydra.sweep.dir"
                )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints which job has the fewest bits at the accuracy floor, where one is set.

        Ends the program with the list of the jobs that failed, if any did; Hydra tells of the first alone.
        """
        paths = sorted(Path(config.hydra.sweep.dir).rglob("summary.json"))
        summaries = {path.parent: json.loads(path.read_text()) for path in paths}
        completed = {folder: summary for folder, summary in summaries.items() if summary["status"] == "completed"}
        floor = OmegaConf.select(config, "run.accuracy_floor")
        if floor is not None and completed:
            print(_fewest_bits(completed, floor, list(config.hydra.overrides.task)))
        failed = [f"  {folder}: {summaries[folder]['error']}" for folder in summaries.keys() - completed.keys()]
        if failed:
            raise SystemExit("\n".join(["fedq: these jobs of the sweep failed, the others are done:", *sorted(failed)]))


def _with_ends(override: Override) -> str:
    """Returns an override as it was given, an interval to draw from as a choice of its two ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start},{value.end}"
    return str(override.input_line)


def _differences(folder: Path, cfg: DictConfig) -> list[str]:
    """Returns how the configuration that Hydra left in a job's folder, if any, differs from the job's now."""
    path = folder / ".hydra" / "config.yaml"
    there = OmegaConf.load(path) if path.exists() else None
    if not isinstance(there, DictConfig):
        return []
    return differences(plain(there), plain(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])))


def _fewest_bits(summaries: Mapping[Path, Mapping[str, Any]], floor: float, given: list[str]) -> str:
    """Returns in a sentence which of the completed jobs has the fewest bits at or above the floor."""
    folder, best = min(summaries.items(), key=lambda item: objective(item[1], floor))
    overrides = map(str, OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    chosen = [override for override in overrides if override not in given]
    job = " ".join([*chosen, "in", str(folder)])
    accuracy = best["final_test_accuracy"]
    if accuracy < floor:
        return f"no job reached a test accuracy of {floor:.2%}; nearest is {job}, with {accuracy:.2%}"
    size = human_bytes(best["broadcasted_bits"] + best["aggregated_bits"])
    rate = 32 / best["broadcast_ratio"] + 32 / best["upload_ratio"]
    return (
        f"fewest bits at a test accuracy of {floor:.2%} or more: {job}, with {size} both ways, "
        f"{rate:.2f} bits a parameter down and up together, at {accuracy:.2%}"
    )
