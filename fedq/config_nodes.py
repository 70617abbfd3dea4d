"""The groups `run` and `encoder`, which have no `_target_`: their keys, types and checks."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RunConfig:
    """The group `run`: length, cohorts, checkpoints and device.

    rounds: Number of rounds.
    clients_per_round: Clients in a cohort.
    seed: Seed of every random draw, from 0 to 2^64 - 1.
    evaluate_every: Rounds between two evaluations; the last round is always evaluated.
    test_batch_size: Examples in a batch of an evaluation.
    checkpoint_every: Rounds between two checkpoints; the last round always has one.
    keep: Number of checkpoints that stay.
    resume: "auto" (from the newest checkpoint in the run's folder), "never", or the path of a checkpoint or a folder.
    min_clients: A round with fewer usable updates is repeated with another cohort.
    repeats: Number of times in a row that a round is repeated before the run ends.
    workers: Threads a rank; "auto" is one a core.
    device: A torch device.
    precision: Number format of forward and backward passes.
    faults: The faults of clients, if any.
    guard: The guard against updates with an unusual norm, if any.
    submodel: The part of the model that each client trains; None for all.
    network: The clients' links and processors, from which a simulated time follows; None for none.
    accuracy_floor: Final accuracy, or other headline metric, that hydra/sweeper=fewest_bits requires. The value is
        measured on validation examples, or on the test set without `validation`.
    validation: The share of examples or clients that is held out, above 0 and below 1; "own" takes the validation
        examples that the dataset has.
    validation_by: "examples" holds out a share of each client's examples, "clients" a share of the clients.
    patience: The run stops early after this number of evaluations in a row without a better value.
    evaluate_clients: The number of clients, or "all", that are also evaluated one by one.
    residual_memory: MiB of memory for the clients' residuals; beyond this limit, the least recently used residuals are
        in files.
    """

    rounds: int
    clients_per_round: int
    seed: int
    evaluate_every: int
    test_batch_size: int
    checkpoint_every: int
    keep: int
    resume: str
    min_clients: int
    repeats: int
    workers: int | Literal["auto"]
    device: str
    precision: Literal["float32", "bf16"]
    faults: dict[str, Any] | None
    guard: dict[str, Any] | None
    submodel: dict[str, Any] | None
    accuracy_floor: float | None = None
    validation: float | Literal["own"] | None = None
    validation_by: Literal["examples", "clients"] = "examples"
    patience: int | None = None
    evaluate_clients: int | Literal["all"] | None = None
    residual_memory: int = 1024
    network: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        counts = ("rounds", "clients_per_round", "evaluate_every", "test_batch_size", "checkpoint_every", "keep")
        for name in (*counts, "min_clients", "workers", "patience", "evaluate_clients"):
            if getattr(self, name) not in (None, "auto", "all") and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("repeats", "residual_memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.min_clients > self.clients_per_round:
            raise ValueError(f"min_clients={self.min_clients} is more than clients_per_round={self.clients_per_round}")
        if isinstance(self.validation, int | float) and not 0 < self.validation < 1:
            raise ValueError(f"validation must be above 0 and below 1, or own, not {self.validation}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")

    @property
    def cohort_size(self) -> int:
        """Clients that are asked in a round: with over-selection, more than `clients_per_round`."""
        extra: int = (self.network or {}).get("over_selection", 0)
        return self.clients_per_round + extra


@dataclass(frozen=True)
class RuleConfig:
    """Another chain for the tensors whose names match a pattern.

    pattern: A shell pattern. The first rule that matches a name counts.
    stages: Nodes with a `_target_`.
    coder: A node with a `_target_`; without one, the coder that fits the last stage.
    """

    pattern: str
    stages: list[Any]
    coder: dict[str, Any] | None = None


@dataclass(frozen=True)
class DirectionConfig:
    """The encoder of one direction. The other fields are arguments of StateDictEncoder.

    stages: Nodes with a `_target_`.
    coder: A node with a `_target_`; without one, the coder that fits the last stage.
    rules: RuleConfigs.
    """

    stages: list[Any]
    coder: dict[str, Any] | None = None
    rules: list[Any] | tuple[()] = ()
    joint: bool = False
    reference: Literal["none", "initial", "last"] = "none"
    common_scale: bool = False
    error_feedback: bool = False
    rate_control: dict[str, Any] | None = None


@dataclass(frozen=True)
class EncoderConfig:
    """Both directions. Other keys, such as bits, are allowed if a ${…} refers to them."""

    threshold: int
    broadcast: dict[str, Any]
    upload: dict[str, Any]
