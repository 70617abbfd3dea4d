"""One run: assemble its parts, resume it, do its rounds, save it."""

import logging
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fedq.config import (
    CHANGES_NOTHING,
    ConfigError,
    build,
    build_protocol,
    build_run,
    build_server,
    flatten,
    to_container,
)
from fedq.config_check import overridden
from fedq.config_nodes import RunConfig
from fedq.data import Client, FederatedDataset
from fedq.data.dataset import plain_integer
from fedq.data.holdout import HeldOut
from fedq.encoding import FixedWidth, Key, Raw, TensorSpec
from fedq.errors import FedqError
from fedq.files import written_whole
from fedq.learning import FederatedAveraging, ServerState
from fedq.simulation import checkpoint
from fedq.simulation.asynchronous import asynchronous_step
from fedq.simulation.client_state_files import ClientStateFiles
from fedq.simulation.loop import Clients, rounds
from fedq.simulation.ranks import Ranks, launched_at
from fedq.simulation.saving import Saver, continued, resumed
from fedq.simulation.selection import Selection
from fedq.simulation.stopping import Stopping
from fedq.simulation.sweep import varied_keys
from fedq.simulation.workers import Workers
from fedq.tracking.console import ConsoleProgress
from fedq.tracking.headline import Headline
from fedq.tracking.metrics import MetricsFile
from fedq.tracking.summary import Summary
from fedq.tracking.tensorboard import TensorBoard

__all__ = ["Ranks", "launched_at", "serve", "train"]

log = logging.getLogger(__name__)


def train(
    cfg: DictConfig,
    folder: Path,
    metrics_file: MetricsFile,
    summary: Summary,
    stopping: Stopping,
    ranks: Ranks | None = None,
) -> None:
    """Trains as a configuration says, and writes all results to the run's folder.

    cfg: a checked configuration.
    folder: the run's folder.
    metrics_file: metrics.jsonl in this folder, locked for this process.
    summary: the run's summary; the caller writes it to the folder at the end.
    stopping: checked after each client, in order to stop the run.
    ranks: the processes that share the run, None for this process alone.

    Raises FedqError or OSError with one clear sentence. The rounds done until then are saved.
    """
    run, config = build_run(cfg), to_container(cfg)
    with ExitStack() as stack:
        earlier, store = resumed(run, folder, config, metrics_file), None
        if clients_keep_state(cfg):
            store = client_store(run, folder, earlier, shared=ranks is not None and ranks.size > 1)
        if ranks:
            shared = {"store": [str(store.folder), store.mark()]} if store and ranks.size > 1 else {}
            ranks.tell({"job": config, **shared})
        process, dataset, clients = assemble(cfg, stopping, stack, store)
        state, done, protocol = process.initialize(), [], process.protocol
        headline = Headline(protocol.task.headline, protocol.task.more_is_better)
        selection = Selection(run, headline)
        exact_message = protocol.exact.encode(protocol.parts.travelling(state.weights), Key(run.seed)).message
        log.info("run.rounds=%d in %s", run.rounds, folder)
        for way in ("broadcast", "upload"):
            if config["encoder"][way]["stages"] and not getattr(protocol.weights, way).compressed:
                log.warning(
                    "encoder.%s compresses nothing: no tensor has more than encoder.threshold=%d elements. Set a lower "
                    "threshold, such as encoder.threshold=100",
                    way,
                    config["encoder"]["threshold"],
                )
        if earlier:
            state, its_folder = continued(process, *earlier), earlier[1]
            log.info("resumed after %d rounds of %s", state.round, its_folder)
            done = metrics_file.restore(its_folder / "metrics.jsonl", state.round)
        gather = partial(ranks.gather, process.contribute) if ranks else None
        step = asynchronous_step(process, run, dataset.num_clients, clients, ranks.size if ranks else 1)
        to_do = rounds(process, state, dataset, run, clients, gather, selection.stops, step)
        # no check refuses the run from here on
        summary.start(config, 8 * len(exact_message), headline)
        keep_configuration(cfg, folder)
        if selection.chooses:
            summary.values["selection"] = selection.values
        for metrics in done:
            selection.write(metrics)
            summary.write(metrics)
        if earlier and not store:  # the clients' state of the best round is not copied, and a resume would need it
            checkpoint.copy_best(selection.values["round"], earlier[1] / "checkpoints", folder / "checkpoints")
        # a resumed run, for example with more rounds, keeps its name in TensorBoard
        name = next((path.name for path in folder.glob("encoder=*")), _run_name())
        tensorboard = stack.enter_context(TensorBoard(folder, name, _hparams(cfg), done, headline))
        progress = stack.enter_context(closing(ConsoleProgress(run.rounds, state.round, headline)))
        saver = Saver(config, folder / "checkpoints", run.keep, metrics_file, store, selection, protocol)
        try:
            saver.save(state)
            for after, metrics in to_do:
                for tracker in (metrics_file, selection, summary, tensorboard, progress):
                    tracker.write(metrics)
                state = after
                if store:
                    store.settle()
                if state.round % run.checkpoint_every == 0 or selection.improved:
                    saver.save(state)
        except BaseException:
            try:
                saver.save(state)
            except OSError as error:  # this error must not hide why the run ends
                log.warning("the state after %d rounds is not saved: %s", state.round, error)
            raise
        saver.save(state)
    summary.print()


def clients_keep_state(cfg: DictConfig) -> bool:
    """Returns whether clients keep state: residuals, an optimizer, personal tensors, or state of the algorithm."""
    one, algorithm = {"parameter": TensorSpec((1,), torch.float32)}, build(cfg, "algorithm")
    keeps = to_container(cfg, "encoder.upload").get("error_feedback") or to_container(cfg, "client.keep_optimizer")
    return bool(keeps or algorithm.personal or algorithm.kept_schema(one))


def client_store(
    run: RunConfig, folder: Path, earlier: tuple[ServerState, Path] | None, shared: bool
) -> ClientStateFiles:
    """Returns the store of the clients' state in the run's `folder`, as it was when `earlier` was saved."""
    store = ClientStateFiles(folder / "checkpoints" / "residuals", run.seed, run.residual_memory * 2**20, shared)
    store.resume(earlier[0].attempt if earlier else 0, earlier and earlier[1] / "checkpoints" / "residuals")
    return store


def keep_configuration(cfg: DictConfig, folder: Path) -> None:
    """Writes the files of `.hydra`.

    Hydra itself would write them too early, before a job can refuse the folder of another run.
    """
    parts = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, part in parts.items():
        with written_whole(folder / ".hydra" / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(part).encode())


def serve(ranks: Ranks) -> None:
    """Does this rank's part of the jobs that rank 0 runs."""
    refused: FedqError | None = None
    with ExitStack() as stack:
        for order in ranks.listen():
            if "job" in order:
                stack.close()
                cfg, store = OmegaConf.create(order["job"]), None
                if "store" in order:
                    its_folder, mark = order["store"]
                    store = ClientStateFiles.joined(its_folder, mark, build_run(cfg).seed)
                try:
                    (process, _, clients), refused = assemble(cfg, ranks.stopping, stack, store), None
                except FedqError as error:  # rank 0 has and reports the same error
                    refused = error
            elif refused:
                raise refused
            else:
                ranks.contribute_to(order, process.contribute, clients)


def assemble(
    cfg: DictConfig, stopping: Stopping, stack: ExitStack, store: ClientStateFiles | None = None
) -> tuple[FederatedAveraging, FederatedDataset, Clients]:
    """Returns the process, the dataset and the clients that a checked configuration describes.

    stopping: checked after each client, in order to stop the run.
    stack: ends the worker threads.
    store: the state of clients between their rounds; None keeps the state in memory.

    Raises ConfigError if the parts do not fit together.
    """
    run = build_run(cfg)
    device, dataset = own_device(run.device), build(cfg, "dataset")
    population = plain_integer("dataset.num_clients", getattr(dataset, "num_clients", None), 1, 2**63)
    if isinstance(run.validation, float):
        dataset = HeldOut(dataset, run.validation, run.validation_by, run.seed)
        population = dataset.num_clients
    if run.cohort_size > population:
        with_extra = " with run.network.over_selection" if run.cohort_size > run.clients_per_round else ""
        raise ConfigError(
            f"run.clients_per_round: {run.cohort_size}{with_extra} is more than the {population} clients; "
            "take fewer clients a round, or set dataset.clients higher if the dataset has this key"
        )
    if isinstance(run.evaluate_clients, int) and run.evaluate_clients > population:
        raise ConfigError(
            f"run.evaluate_clients: {run.evaluate_clients} is more than the {population} clients; take fewer, or all"
        )
    workers = stack.enter_context(Workers(None if run.workers == "auto" else run.workers))
    faults, guard, network = (
        build(cfg, f"run.{name}") if getattr(run, name) else None for name in ("faults", "guard", "network")
    )
    if faults and network and network.deadline is None:
        raise ConfigError(
            "run.network.deadline must be given with run.faults: without a deadline the server waits forever for "
            "clients that never answer"
        )
    process = FederatedAveraging(
        **build_protocol(cfg, dataset, device),
        server=build_server(cfg),
        map=stopping.map(workers.map),
        network=faults.uplink if faults else None,
        guard=guard,
        min_clients=run.min_clients,
        precision=run.precision,
        store=store,
        population=population,
        clock=partial(network.clock, examples=dataset.test(), enough=run.clients_per_round) if network else None,
    )
    if faults and getattr(faults, "nan", 0):
        name, last = list(process.protocol.weights.upload.chains.items())[-1]
        fixed = isinstance(last.encoder.coder, FixedWidth | Raw)
        if last.spec.dtype != torch.float32 or (last.encoder.stages and fixed):
            raise ConfigError(
                f"run.faults.nan must be 0 with this model and encoder: a message ends in {name!r}, "
                "which is not sent as float32, and any bytes there are valid"
            )

    def clients(attempt: int, numbers: Iterable[int]) -> list[Client]:
        chosen = [dataset.client(number) for number in numbers]
        return [faults.client(one, Key(run.seed, attempt, one.number)) for one in chosen] if faults else chosen

    return process, dataset, clients


def own_device(name: str) -> torch.device:
    """Returns the device that this process uses for `run.device`. Raises ConfigError if the device is unusable."""
    if name == "cuda":  # each process of a machine takes another device
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # no driver, another build of torch, an unknown name
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(f"run.device: {name} cannot be used here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # torch puts tensors from other ranks on this device
    return device


def _run_name() -> str:
    """Returns the choices that differ from the defaults, as TensorBoard shows the run."""
    config = HydraConfig.get()
    encoder = f"encoder={config.runtime.choices['encoder']}"
    others = [o for o in config.overrides.task if not o.startswith(("encoder=", "dataset.path="))]
    return re.sub(r"[^\w.=,+-]+", "_", ",".join([encoder, *others]))[:200]


def _hparams(cfg: DictConfig) -> dict[str, str | float | bool]:
    """Returns the hyperparameters for TensorBoard: encoder, model, seed, groups that were chosen, and `varied_keys`.

    TensorBoard's table shows five columns; more constants would hide the hyperparameters that differ between runs.
    """
    config, values = HydraConfig.get(), dict[str, str | float | bool]()
    for group, choice in config.runtime.choices.items():
        if group in {"encoder", "model"} | overridden(config.overrides.task):
            values[group] = str(choice)
    varied = varied_keys() - values.keys() - {*CHANGES_NOTHING, "run.evaluate_every"}
    keys = {"run.seed", *(re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key) for key in varied)}
    for name, value in flatten(to_container(cfg)):
        if any(name == key or name.startswith((f"{key}.", f"{key}[")) for key in keys):
            values[name] = value if isinstance(value, int | float | str) else str(value)
    return values
