"""State on the server that learns over the rounds, for a stage or for rate control."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from fedq.encoding.schema import Tensors, TensorSpec
from fedq.errors import check_choice

Aggregation = Literal["sum", "min", "max", "stack"]


@dataclass(frozen=True)
class StateUpdate:
    """One tensor of a client's report to the state.

    spec: The tensor's spec.
    aggregation: How the reports of a cohort are combined. `stack` joins the clients' tensors along a new first
        dimension, in the cohort's order.
    """

    spec: TensorSpec
    aggregation: Aggregation

    def __post_init__(self) -> None:
        check_choice("aggregation", self.aggregation, Aggregation)
        if self.aggregation == "sum" and not self.spec.dtype.is_floating_point and self.spec.dtype.itemsize < 4:
            raise ValueError(f"a sum of {self.spec.dtype} soon overflows: report int32 or int64")


class Adaptive(ABC):
    """The common interface of adaptive stages and rate control.

    Each round the server sends `params(state)` to the clients. The params travel in the broadcast and are counted.
    Each client's `encode` may report tensors (`update_spec`). Reports travel exact in the client's upload. The server
    combines the reports of the cohort as declared, and computes the next state from them.

    `spec` is the spec of the tensor that enters the chain. State, params and aggregated reports are on the CPU,
    whatever the tensor's device.
    """

    @abstractmethod
    def initial_state(self, spec: TensorSpec) -> Tensors:
        """Returns the state before the first round."""

    @abstractmethod
    def params(self, state: Tensors) -> Tensors:
        """Returns this round's params, for encode and decode. Shapes and dtypes are the same in every round."""

    @abstractmethod
    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """Returns the state after a round. `aggregated` is empty if nothing is reported."""

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """Returns the tensors that `encode` reports, in this order."""
        return {}
