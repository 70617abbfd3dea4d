"""The command line: compose the configuration, build the parts, run.

python -m fedq.train encoder=uint8     (installed: fedq-train encoder=uint8)
"""

import logging
import os
import re
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fedq.config import ConfigError, build, build_encoder, build_run, check, explain, plain
from fedq.errors import FedqError
from fedq.tracking.console import ConsoleProgress
from fedq.tracking.metrics import MetricsFile
from fedq.tracking.summary import Summary

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
# a wheel carries conf/ inside the package, a checkout beside it
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """Runs the command line."""
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's errors come through to be told in one line
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except Exception as error:  # a job tells of its own: what arrives here is Hydra's
        if traceback_wanted:
            raise
        sys.exit(f"fedq: {explain(error)}")


def job(cfg: DictConfig) -> None:
    """Runs one job of a command line; a job that fails says so, and does not end the sweep it may be part of."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        metrics_file = MetricsFile(folder)
    except FileExistsError as error:  # not a folder to leave anything in
        raise ConfigError(f"{folder} belongs to another run; set hydra.run.dir or hydra.sweep.subdir") from error
    try:
        with closing(metrics_file), Summary(folder) as summary:
            train(cfg, folder, metrics_file, summary)
    except (FedqError, OSError) as error:
        log.error("%s", error)
    except KeyboardInterrupt:
        log.error("interrupted; what was done is in %s", folder)
        sys.exit(130)
    except Exception:
        log.exception("this is a bug in fedq or in a class that the configuration names:")
    else:
        return
    if HydraConfig.get().mode == RunMode.RUN:
        sys.exit(1)


def train(cfg: DictConfig, folder: Path, metrics_file: MetricsFile, summary: Summary) -> None:
    """Trains as a composed configuration says; all that comes of it goes to the run's `folder`.

    Raises FedqError or OSError with one clear sentence; what was done until then is kept.
    """
    check(cfg)
    # torch takes seconds to load: a typo in `run` is told before
    from fedq.encoding import Key, StateDictEncoder
    from fedq.learning import FederatedAveraging
    from fedq.simulation import checkpoint
    from fedq.simulation.loop import rounds
    from fedq.simulation.workers import Workers
    from fedq.tracking.tensorboard import TensorBoard

    run = build_run(cfg)
    with ExitStack() as stack:
        dataset = build(cfg, "dataset")
        if run.clients_per_round > dataset.num_clients:
            raise ConfigError(
                f"run.clients_per_round: {run.clients_per_round} is more than the {dataset.num_clients} clients; "
                "take fewer, or more with dataset.clients where the dataset allows"
            )
        workers = stack.enter_context(Workers(None if run.workers == "auto" else run.workers))
        process = FederatedAveraging(
            model=build(cfg, "model", num_classes=dataset.num_classes),
            client=build(cfg, "client"),
            server=build(cfg, "server"),
            broadcast=build_encoder(cfg, "broadcast"),
            upload=build_encoder(cfg, "upload"),
            seed=run.seed,
            device=run.device,
            map=workers.map,
            min_clients=run.min_clients,
        )
        state = process.initialize()
        exact_message, _ = StateDictEncoder().encode(state.weights, Key(run.seed))
        summary.start(run.seed, 8 * len(exact_message))
        name = _run_name()
        log.info("run %s of %d rounds in %s", name, run.rounds, folder)
        tensorboard = stack.enter_context(closing(TensorBoard(folder, name, _hparams(cfg))))
        progress = stack.enter_context(closing(ConsoleProgress(run.rounds)))
        try:
            for after, metrics in rounds(process, state, dataset, run):
                state = after
                for tracker in (metrics_file, summary, tensorboard, progress):
                    tracker.write(metrics)
                if state.round % run.checkpoint_every == 0:
                    checkpoint.save(state, folder / "checkpoints")
        finally:
            # also of a run that fails; on a full disk the checkpoint before stays
            with suppress(OSError):
                checkpoint.save(state, folder / "checkpoints")
    summary.print()


def _run_name() -> str:
    """Returns the choices that differ from the defaults, as TensorBoard shows the run."""
    config = HydraConfig.get()
    encoder = f"encoder={config.runtime.choices['encoder']}"
    others = [o for o in config.overrides.task if not o.startswith(("encoder=", "dataset.path="))]
    return re.sub(r"[^\w.=,+-]+", "_", ",".join([encoder, *others]))[:200]


def _hparams(cfg: DictConfig) -> dict[str, str | float | bool]:
    """Returns what TensorBoard's table of runs shows: choices of groups, the encoder, what the command line set."""
    choices = HydraConfig.get().runtime.choices
    given = {override.split("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    values: dict[str, str | float | bool] = {}
    for group, node in plain(cfg).items():
        values[group] = str(choices[group])
        for key, value in node.items():
            name = f"{group}.{key}"
            shown = group == "encoder" or name in given or name in ("client.lr", "server.lr", "run.seed")
            if shown and isinstance(value, int | float | str):
                values[name] = value
    return values


if __name__ == "__main__":
    main()
