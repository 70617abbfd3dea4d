"""The command line: compose the configuration, build the parts, run.

python -m fedq.train encoder=uint8     (installed: fedq-train encoder=uint8)
"""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from datetime import datetime
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fedq.config import (
    ConfigError,
    RunConfig,
    build,
    build_encoder,
    build_run,
    build_server,
    check,
    differences,
    explain,
    flat,
    overridden,
    plain,
)
from fedq.errors import FedqError
from fedq.files import written_whole
from fedq.simulation.stopping import Interrupted, Stopping
from fedq.simulation.sweep import objective
from fedq.tracking.console import ConsoleProgress
from fedq.tracking.metrics import MetricsFile
from fedq.tracking.summary import Summary

if TYPE_CHECKING:
    import torch

    from fedq.data import Client, FederatedDataset
    from fedq.learning import FederatedAveraging, ServerState
    from fedq.simulation.client_state_files import Residuals
    from fedq.simulation.loop import Clients
    from fedq.simulation.ranks import Ranks

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
# a wheel carries conf/ inside the package, a checkout beside it
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """Runs the command line: whole, or as one of the processes that torchrun starts."""
    if (here := os.getcwd()) not in sys.path:  # as with -m: parts of one's own are found in the folder it is called in
        sys.path.insert(0, here)
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
    # Not through the interpreter's end: what a thread of gloo still holds of a tensor then aborts the process.
    os._exit(code)


def rank() -> None:
    """Runs the command line as one of the processes that torchrun starts."""
    from fedq.simulation.ranks import Ranks, launched_at

    try:
        with Ranks(Stopping()) as ranks:
            if ranks.rank:
                serve(ranks)
                return
            # a process that torchrun starts again finds the folder of the one before it
            if name := launched_at(datetime.now()):
                folders = {"hydra.run.dir": f"outputs/{name}", "hydra.sweep.dir": f"outputs/multirun/{name}"}
                given = {argument.split("=")[0] for argument in sys.argv}
                sys.argv += [f"{key}={folder}" for key, folder in folders.items() if key not in given]
            compose(wraps(job)(partial(job, ranks=ranks)))
    except FedqError as error:
        sys.exit(f"fedq: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def compose(task: Callable[[DictConfig], float]) -> None:
    """Has Hydra run `task` with the configuration that the command line makes, or with each of a sweep's."""
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's errors come through to be told in one line
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except Exception as error:  # a job tells of its own: what arrives here is Hydra's
        if traceback_wanted:
            raise
        sys.exit(f"fedq: {explain(error)}")


def job(cfg: DictConfig, ranks: "Ranks | None" = None) -> float:
    """Runs one job of a command line and returns what a search minimises, infinity where the job fails.

    A job that fails says so, and does not end the sweep it may be part of.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if earlier := finished(cfg, folder):
            its_folder, values = earlier
            log.info("%s holds this run, finished: nothing to do", its_folder)
            return objective(values, plain(cfg, "run").get("accuracy_floor"))
        metrics_file = MetricsFile(folder)
    except BlockingIOError as error:  # not a folder to leave anything in
        raise ConfigError(f"another process runs in {folder}; set hydra.run.dir or hydra.sweep.subdir") from error
    summary = Summary(folder)
    try:
        with (
            ranks.stopping if ranks else Stopping() as stopping,
            closing(metrics_file),
            summary,
        ):
            train(cfg, folder, metrics_file, summary, stopping, ranks)
    except (FedqError, OSError) as error:
        log.error("%s", error)
    except KeyboardInterrupt as error:
        log.error("stopped; to go on, give the same command again with %s", _folder_argument())
        sys.exit(error.exit_code if isinstance(error, Interrupted) else 130)
    except Exception:  # of whatever class an author's part raises: told whole, and a sweep goes on
        log.exception("this is a bug in fedq or in a class that the configuration names:")
    else:
        return objective(summary.values, plain(cfg, "run").get("accuracy_floor"))
    if HydraConfig.get().mode == RunMode.RUN or not summary.is_ours or (ranks and ranks.apart):
        sys.exit(1)  # a sweep goes on and tells of all that failed at its end, by their summaries
    return math.inf


def finished(cfg: DictConfig, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the folder and summary of a run that is the whole of what `cfg` asks for, None if there is none.

    It is in `folder` or, of a search, which may draw the same choice again, in the folder of another job.
    """
    run = plain(cfg, "run") or {}  # nothing is checked yet
    resume = str(run.get("resume"))
    if resume == "never" or (resume != "auto" and Path(resume).resolve().is_relative_to(folder.resolve())):
        return None
    search = HydraConfig.get().mode == RunMode.MULTIRUN and run.get("accuracy_floor") is not None
    others = sorted(Path(HydraConfig.get().sweep.dir).rglob("summary.json")) if search else []
    for path in (folder / "summary.json", *others):
        with suppress(FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):  # cut short, or not ours
            summary = json.loads(path.read_text())
            rounds, wanted = summary["rounds"], run["rounds"]
            enough = rounds == wanted or (path.parent == folder and rounds > wanted)
            same = not differences(summary["config"], plain(cfg), going_on=False)
            if summary["status"] == "completed" and enough and same:
                return path.parent, summary
    return None


def train(
    cfg: DictConfig,
    folder: Path,
    metrics_file: MetricsFile,
    summary: Summary,
    stopping: Stopping,
    ranks: "Ranks | None" = None,
) -> None:
    """Trains as a composed configuration says; all that comes of it goes to the run's `folder`.

    Raises FedqError or OSError with one clear sentence; what was done until then is kept.
    """
    check(cfg, HydraConfig.get().overrides.task)
    # torch takes seconds to load: a typo in `run` is told before
    from fedq.encoding import Key, StateDictEncoder, schema_of
    from fedq.simulation import checkpoint
    from fedq.simulation.loop import rounds
    from fedq.tracking.tensorboard import TensorBoard

    run, config = build_run(cfg), plain(cfg)
    with ExitStack() as stack:
        earlier, residuals = resumed(run, folder, config, metrics_file), None
        if config["encoder"]["upload"].get("error_feedback"):
            residuals = clients_residuals(run, folder, earlier, shared=ranks is not None and ranks.size > 1)
        if ranks:
            kept = {"residuals": [str(residuals.folder), residuals.mark()]} if residuals and ranks.size > 1 else {}
            ranks.tell({"job": config, **kept})
        process, dataset, clients = assemble(cfg, stopping, stack, residuals)
        state = process.initialize()
        exact_message, _ = StateDictEncoder().encode(state.weights, Key(run.seed))
        # a run that goes on, with more rounds say, stays one run in TensorBoard
        name = next((path.name for path in folder.glob("encoder=*")), _run_name())
        log.info("run %s of %d rounds in %s", name, run.rounds, folder)
        done, shown = [], 0
        if earlier:
            if schema_of(earlier[0].weights) != schema_of(state.weights):
                raise ConfigError(f"{earlier[1]}: its checkpoint is of another model: this one has other tensors")
            state, its_folder = earlier
            log.info("going on after %d rounds of %s", state.round, its_folder)
            done = metrics_file.restore(its_folder / "metrics.jsonl", state.round)
            shown = state.round if its_folder.samefile(folder) else 0
        # nothing is left to refuse
        summary.start(config, 8 * len(exact_message))
        keep_configuration(cfg, folder)
        tensorboard = stack.enter_context(TensorBoard(folder, name, _hparams(cfg), shown if earlier else None))
        for metrics in done:
            summary.write(metrics)
        for metrics in done[shown:]:
            tensorboard.write(metrics)
        progress = stack.enter_context(closing(ConsoleProgress(run.rounds, state.round)))
        gather = partial(ranks.gather, process.contribute) if ranks else None
        saved = None

        def save() -> None:
            nonlocal saved
            if saved != state.round:
                metrics_file.sync()
                if residuals:
                    residuals.flush()
                checkpoint.save(state, config, folder / "checkpoints", run.keep)
                saved = state.round
                if residuals:
                    residuals.prune([state.serial, *checkpoint.serials(folder / "checkpoints")])

        try:
            save()
            for after, metrics in rounds(process, state, dataset, run, clients, gather):
                for tracker in (metrics_file, summary, tensorboard, progress):
                    tracker.write(metrics)
                state = after
                if residuals:
                    residuals.settle()
                if state.round % run.checkpoint_every == 0:
                    save()
        finally:
            # also of a run that fails; on a full disk the checkpoint before stays
            with suppress(OSError):
                save()
    summary.print()


def resumed(
    run: RunConfig, folder: Path, config: dict[str, Any], metrics_file: MetricsFile
) -> "tuple[ServerState, Path] | None":
    """Returns the state to go on from and the folder of the run it is from, None to start afresh.

    Raises ConfigError where `folder` is another run's, or more rounds are done than are asked for.
    """
    from fedq.simulation import checkpoint

    earlier = checkpoint.resume(run.resume, folder, config)
    if not earlier and not metrics_file.empty:
        raise ConfigError(f"{folder} belongs to another run; set hydra.run.dir or hydra.sweep.subdir")
    if earlier and earlier[0].round > run.rounds:
        raise ConfigError(
            f"run.rounds: {earlier[0].round} rounds are done already, in {earlier[1]}; "
            f"ask for more than {run.rounds}, or start in a new folder"
        )
    return earlier


def clients_residuals(
    run: RunConfig, folder: Path, earlier: "tuple[ServerState, Path] | None", shared: bool
) -> "Residuals":
    """Returns what keeps the clients' residuals in the run's `folder`, as they were when `earlier` was saved."""
    from fedq.simulation.client_state_files import Residuals

    residuals = Residuals(folder / "checkpoints" / "residuals", run.seed, run.residual_memory * 2**20, shared)
    if earlier:
        state, its_folder = earlier
        residuals.begin(state.serial, its_folder / "checkpoints" / "residuals")
    else:
        residuals.begin(0)
    return residuals


def keep_configuration(cfg: DictConfig, folder: Path) -> None:
    """Writes the files of `.hydra`, which Hydra itself writes before a job can refuse another run's folder."""
    parts = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, part in parts.items():
        with written_whole(folder / ".hydra" / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(part).encode())


def serve(ranks: "Ranks") -> None:
    """Does this process's part of what rank 0 runs."""
    from fedq.simulation.client_state_files import Residuals

    refused: FedqError | None = None
    with ExitStack() as stack:
        for order, message in ranks.listen():
            if "job" in order:
                stack.close()
                cfg, residuals = OmegaConf.create(order["job"]), None
                if "residuals" in order:
                    its_folder, mark = order["residuals"]
                    residuals = Residuals.joined(its_folder, mark, build_run(cfg).seed)
                try:
                    (process, _, clients), refused = assemble(cfg, ranks.stopping, stack, residuals), None
                except FedqError as error:  # if rank 0 finds the same, it says so and goes on to a sweep's next job
                    refused = error
            elif refused:
                raise refused
            else:
                ranks.contribute_to(order, message, process.contribute, clients)


def assemble(
    cfg: DictConfig, stopping: Stopping, stack: ExitStack, residuals: "Residuals | None" = None
) -> tuple["FederatedAveraging", "FederatedDataset", "Clients"]:
    """Returns what a checked configuration describes; `stack` ends its threads, `residuals` are the clients'.

    Raises ConfigError where its parts do not fit together.
    """
    import torch

    from fedq.encoding import FixedWidth, Key, Raw
    from fedq.learning import FederatedAveraging
    from fedq.simulation.workers import Workers

    run = build_run(cfg)
    device, dataset = own_device(run.device), build(cfg, "dataset")
    if run.clients_per_round > dataset.num_clients:
        raise ConfigError(
            f"run.clients_per_round: {run.clients_per_round} is more than the {dataset.num_clients} clients; "
            "take fewer, or more with dataset.clients where the dataset allows"
        )
    workers = stack.enter_context(Workers(None if run.workers == "auto" else run.workers))
    faults, guard, submodel = (
        build(cfg, f"run.{name}") if getattr(run, name) else None for name in ("faults", "guard", "submodel")
    )
    process = FederatedAveraging(
        model=build(cfg, "model", num_classes=dataset.num_classes),
        client=build(cfg, "client"),
        server=build_server(cfg),
        broadcast=build_encoder(cfg, "broadcast"),
        upload=build_encoder(cfg, "upload"),
        seed=run.seed,
        device=device,
        map=stopping.map(workers.map),
        uplink=faults.uplink if faults else None,
        guard=guard,
        min_clients=run.min_clients,
        precision=run.precision,
        residuals=residuals,
        submodel=submodel,
    )

    if faults and getattr(faults, "nan", 0):
        name, (spec, chain) = list(process.upload.chains(process.client_side.schema).items())[-1]
        if spec.dtype != torch.float32 or (chain.stages and isinstance(chain.coder, FixedWidth | Raw)):
            raise ConfigError(
                f"run.faults.nan must be 0 with this model and encoder: a message ends in {name!r}, "
                "which does not travel as float32, and any bytes there can be believed"
            )

    def clients(serial: int, numbers: Iterable[int]) -> "list[Client]":
        chosen = [dataset.client(number) for number in numbers]
        return [faults.client(one, Key(run.seed, serial, one.number)) for one in chosen] if faults else chosen

    return process, dataset, clients


def own_device(name: str) -> "torch.device":
    """Returns the device that this process takes for `run.device`. Raises ConfigError where it cannot be used."""
    import torch

    if name == "cuda":  # of several processes on a machine, each takes a device of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch's, of a driver, a build or a name that is none
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(f"run.device: {name} cannot be used here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what comes from other ranks is put there
    return device


def _folder_argument() -> str:
    """Returns the argument with which the command finds this run's, or this sweep's, folder again."""
    config = HydraConfig.get()
    if config.mode == RunMode.RUN:
        return f"hydra.run.dir={config.runtime.output_dir}"
    return f"hydra.sweep.dir={Path(config.sweep.dir).absolute()}"


def _run_name() -> str:
    """Returns the choices that differ from the defaults, as TensorBoard shows the run."""
    config = HydraConfig.get()
    encoder = f"encoder={config.runtime.choices['encoder']}"
    others = [o for o in config.overrides.task if not o.startswith(("encoder=", "dataset.path="))]
    return re.sub(r"[^\w.=,+-]+", "_", ",".join([encoder, *others]))[:200]


def _hparams(cfg: DictConfig) -> dict[str, str | float | bool]:
    """Returns what TensorBoard's table of runs shows: choices of groups, the encoder, what the command line set."""
    config, composed = HydraConfig.get(), plain(cfg)
    choices, given = config.runtime.choices, overridden(config.overrides.task)
    keys = {re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key) for key in given - choices.keys()}
    values: dict[str, str | float | bool] = {
        group: str(choice) for group, choice in choices.items() if group in composed or group in given
    }
    for name, value in flat(composed):
        knob = re.fullmatch(r"encoder\.\w+|client\.lr|server\.lr|run\.seed", name)
        if knob or any(name == key or name.startswith((f"{key}.", f"{key}[")) for key in keys):
            values[name] = value if isinstance(value, int | float | str) else str(value)
    return values


if __name__ == "__main__":
    main()
