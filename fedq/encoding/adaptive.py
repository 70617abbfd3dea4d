"""State that the server keeps for a stage or a coder, and that follows the rounds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

from fedq.encoding.schema import Tensors, TensorSpec

Aggregation = Literal["sum", "min", "max", "stack"]


@dataclass(frozen=True)
class StateUpdate:
    """What a client's encode reports to the state: its spec and how a cohort's are combined.

    `stack` puts the clients' tensors behind each other along a new first dimension, in the cohort's order.
    """

    spec: TensorSpec
    aggregation: Aggregation

    def __post_init__(self) -> None:
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, not {self.aggregation!r}")
        if self.aggregation == "sum" and not self.spec.dtype.is_floating_point and self.spec.dtype.itemsize < 4:
            raise ValueError(f"a sum of {self.spec.dtype} soon overflows: report int32 or int64")


class Adaptive(ABC):
    """What AdaptiveEncodingStage and AdaptiveCoder share: state on the server that learns over the rounds.

    Each round the server sends `params(state)` to the clients, in the broadcast, where they are counted. Each
    client's `encode` may report tensors (`update_spec`), which travel exact in its upload, are combined over the
    cohort as declared, and give the next state. `spec` is that of the tensor that enters the chain. State, params and
    aggregated reports are on the CPU, whatever device the tensor is on.
    """

    @abstractmethod
    def initial_state(self, spec: TensorSpec) -> Tensors:
        """Returns the state before the first round."""

    @abstractmethod
    def params(self, state: Tensors) -> Tensors:
        """Returns what encode and decode need this round; shapes and dtypes are the same every round."""

    @abstractmethod
    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """Returns the next round's state, after each that is done; without reports `aggregated` is empty."""

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """Returns what `encode` reports, in this order."""
        return {}
