"""The command line: parses and composes a configuration, runs it alone or as a rank, and sets the exit code.

python -m fedq.train encoder=uint8     (installed: fedq-train encoder=uint8)
"""

import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig

from fedq.config import ConfigError, check, explain, to_container
from fedq.config_check import overridden
from fedq.errors import FedqError
from fedq.files import remove_leftovers
from fedq.simulation.earlier import finished
from fedq.simulation.stopping import Interrupted, Stopping
from fedq.simulation.sweep import objective, register
from fedq.tracking.metrics import MetricsFile
from fedq.tracking.summary import Summary

if TYPE_CHECKING:
    from fedq.simulation.ranks import Ranks

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
# a wheel has conf/ inside the package, a checkout has conf/ next to the package
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """Runs the command line, alone or as one of the processes that torchrun starts."""
    if (here := os.getcwd()) not in sys.path:  # like python -m: a user's modules are in the current folder
        sys.path.insert(0, here)
    # argparse refuses an option between overrides, such as -m
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda given: re.match(r"~|[^-=][^=]*=", given) is not None)
    if {"-sc", "--shell-completion"} & set(sys.argv) and sys.argv[0].endswith(".py"):
        # Hydra's script would complete "python FILE", and nothing for "python -m MODULE"
        sys.exit('fedq: shells complete the installed command alone: eval "$(fedq-train -sc install=bash)"')
    if "RANK" not in os.environ:
        compose(job)
        return
    try:
        rank()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Exits without the interpreter's cleanup, in which a thread of gloo that still holds a tensor would abort the
    # process.
    os._exit(code)


def rank() -> None:
    """Runs the command line as one of the processes that torchrun starts."""
    run = simulation_run()
    try:
        with run.Ranks(Stopping()) as ranks:
            if ranks.rank:
                run.serve(ranks)
                return
            # a process that torchrun restarts finds the folder of its predecessor
            if name := run.launched_at(datetime.now()):
                folders = {"hydra.run.dir": f"outputs/{name}", "hydra.sweep.dir": f"outputs/multirun/{name}"}
                given = {argument.split("=")[0] for argument in sys.argv}
                sys.argv += [f"{key}={folder}" for key, folder in folders.items() if key not in given]
            compose(wraps(job)(partial(job, ranks=ranks)))
    except FedqError as error:
        sys.exit(f"fedq: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def simulation_run() -> ModuleType:
    """Imports `fedq.simulation.run`. torch takes seconds to load; an error in the configuration must show earlier."""
    from fedq.simulation import run

    return run


def compose(task: Callable[[DictConfig], float]) -> None:
    """Lets Hydra call `task` with the composed configuration, or with the configuration of each job of a sweep."""
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, and they are printed here in one line
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except Exception as error:  # an error of Hydra: jobs report their errors
        if traceback_wanted:
            raise
        cause = error.__cause__ if isinstance(error, ValueError) else error  # the log file cannot be opened
        if isinstance(cause, OSError) and cause.errno:  # Hydra's subclasses of OSError have no number
            sys.exit(f"fedq: {_in_words(cause)}")
        sys.exit(f"fedq: {explain(error)}")


def job(cfg: DictConfig, ranks: "Ranks | None" = None) -> float:
    """Runs one job of a command line and returns the value that a search minimises.

    The value is infinite if the job fails. A failed job reports its error and does not end its sweep.

    cfg: the composed configuration.
    ranks: the processes that share the job, None for this process alone.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    earlier = finished(cfg, folder)
    register(earlier[0] if earlier else folder)
    if earlier:
        its_folder, values = earlier
        log.info("%s holds this run, finished: nothing to do", its_folder)
        return objective(values, to_container(cfg, "run").get("accuracy_floor"))
    try:
        metrics_file = MetricsFile(folder)
    except BlockingIOError as error:  # the other process owns the folder: write nothing
        raise ConfigError(f"another process runs in {folder}; set hydra.run.dir or hydra.sweep.subdir") from error
    for place in (folder, folder / ".hydra"):
        remove_leftovers(place)
    summary = Summary(folder)
    try:
        with (
            ranks.stopping if ranks else Stopping() as stopping,
            closing(metrics_file),
            summary,
        ):
            check(cfg, HydraConfig.get().overrides.task)
            warn_of_rates()
            simulation_run().train(cfg, folder, metrics_file, summary, stopping, ranks)
    except FedqError as error:
        log.error("%s", error)
    except OSError as error:
        log.error("%s", _in_words(error))
    except KeyboardInterrupt as error:
        log.error("stopped; to resume, give the same command again with %s", _folder_argument())
        sys.exit(error.exit_code if isinstance(error, Interrupted) else 130)
    except Exception:  # any class that a user's own part raises
        log.exception("this is a bug in fedq or in a class that the configuration names:")
    else:
        return objective(summary.values, to_container(cfg, "run").get("accuracy_floor"))
    if HydraConfig.get().mode == RunMode.RUN or not summary.is_ours or (ranks and ranks.apart):
        sys.exit(1)  # a sweep continues, and reports all failed jobs at its end
    return math.inf


def warn_of_rates() -> None:
    """Logs a warning if a preset's rate stays with another client or server than the preset's."""
    config = HydraConfig.get()
    preset, given = config.runtime.choices.get("experiment"), overridden(config.overrides.task)
    file = CONF / "experiment" / f"{preset}.yaml"
    rates = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for group in ("client", "server"):
        rate, choice = rates.get(group, {}).get("lr"), config.runtime.choices[group]
        if rate is not None and group in given and f"{group}.lr" not in given:
            log.warning(
                "%s.lr=%s is the rate of experiment=%s, not of %s=%s: set %s.lr",
                group,
                rate,
                preset,
                group,
                choice,
                group,
            )


def _in_words(error: OSError) -> str:
    """Returns a sentence about an error, with the path of the file if the error names one."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _folder_argument() -> str:
    """Returns the argument, quoted for a shell, that selects the folder of this run or this sweep."""
    config = HydraConfig.get()
    run = config.mode == RunMode.RUN
    folder = config.runtime.output_dir if run else str(Path(config.sweep.dir).absolute())
    if not re.fullmatch(r"[\w./-]+", folder, re.ASCII):  # Hydra's grammar needs quotes
        folder = QuotedString(folder.replace("${", r"\${"), Quote.double).with_quotes()
    return f"hydra.{'run' if run else 'sweep'}.dir={shlex.quote(folder)}"


if __name__ == "__main__":
    main()
