"""How a run is saved, and how a later run resumes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedq.config import ConfigError
from fedq.config_nodes import RunConfig
from fedq.encoding import schema_of
from fedq.errors import FedqError
from fedq.learning import FederatedAveraging, ServerState
from fedq.learning.protocol import Protocol
from fedq.learning.server import server_step
from fedq.simulation import checkpoint
from fedq.simulation.client_state_files import ClientStateFiles
from fedq.simulation.selection import Selection
from fedq.tracking.metrics import MetricsFile


@dataclass
class Saver:
    """Writes checkpoints from which a run can resume. The best checkpoint of the selection stays."""

    config: dict[str, Any]
    folder: Path
    keep: int
    metrics_file: MetricsFile
    store: ClientStateFiles | None
    selection: Selection
    protocol: Protocol
    saved: int | None = None

    def save(self, state: ServerState) -> None:
        """Writes a checkpoint of `state`, unless the last one is of the same round."""
        if self.saved == state.round:
            return
        self.metrics_file.sync()
        if self.store:
            self.store.flush()
        saved = self.protocol.without_base(state)
        checkpoint.save(saved, self.config, self.folder, self.keep, self.selection.values["round"])
        self.saved = state.round
        if self.store:
            self.store.prune([state.attempt, *checkpoint.attempts(self.folder)])


def resumed(
    run: RunConfig, folder: Path, config: dict[str, Any], metrics_file: MetricsFile
) -> tuple[ServerState, Path] | None:
    """Returns the state to resume from and the folder of its run, or None for a new run.

    Raises ConfigError if `folder` belongs to another run, or if more rounds are done than `run.rounds` asks for.
    """
    earlier = checkpoint.resume(run.resume, folder, config)
    if not earlier and not metrics_file.empty:
        raise ConfigError(f"{folder} belongs to another run; set hydra.run.dir or hydra.sweep.subdir")
    if earlier and earlier[0].round > run.rounds:
        raise ConfigError(
            f"run.rounds: {earlier[0].round} rounds are done already, in {earlier[1]}; "
            f"ask for more than {run.rounds}, or start in a new folder"
        )
    return earlier


def continued(process: FederatedAveraging, state: ServerState, folder: Path) -> ServerState:
    """Returns a checkpoint's state with the frozen tensors. Raises ConfigError if `process` cannot continue the run."""
    fresh = process.initialize()
    try:
        state = process.protocol.with_base(state)
    except FedqError as error:
        raise ConfigError(f"{folder}: {error}") from error
    if schema_of(state.weights) != schema_of(fresh.weights):
        raise ConfigError(f"{folder}: its checkpoint is of another model: the tensors differ")
    for way in ("broadcast", "upload"):
        if schema_of(getattr(state, way)) != schema_of(getattr(fresh, way)):
            raise ConfigError(f"{folder}: its checkpoint holds another state of encoder.{way}")
    weights = {name: state.weights[name] for name in process.protocol.parameters}
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    try:
        server_step(process.server, state.optimizer, weights, frozenset(weights), zeros, 1)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder}: its checkpoint holds another state of the server optimizer: {reason}") from error
    return state
