"""A sweep is checked whole before its first job starts."""

import json
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedq.config import ConfigError, check, explain


class CheckSweep(Callback):
    """Composes and checks every job of a sweep when it starts: a typo in the last job must not wait for the first."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program with one line where a job's configuration is wrong."""
        loader = GlobalHydra.instance().config_loader()
        overrides = OverridesParser.create(loader).parse_overrides(list(config.hydra.overrides.task))
        try:
            (jobs,) = BasicSweeper.split_arguments(overrides, None)
        except HydraException:
            return  # an interval that another sweeper draws from: each job is checked when it starts
        for job in jobs:
            try:
                check(loader.load_configuration(config.hydra.job.config_name, job, RunMode.RUN))
            except ConfigError as error:
                # Hydra turns a callback's exceptions into warnings, but lets this one pass
                raise SystemExit(f"fedq: {' '.join(job)}: {error}") from error
            except (HydraException, OmegaConfBaseException) as error:
                raise SystemExit(f"fedq: {' '.join(job)}: {explain(error)}") from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program with the list of the jobs that failed, if any did; Hydra tells of the first alone."""
        failed = []
        for path in sorted(Path(config.hydra.sweep.dir).glob("*/summary.json")):
            summary = json.loads(path.read_text())
            if summary["status"] != "completed":
                failed.append(f"  {path.parent}: {summary['error']}")
        if failed:
            raise SystemExit("\n".join(["fedq: these jobs of the sweep failed, the others are done:", *failed]))
