"""The two interfaces that an author of a compression scheme implements."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedq.keys import Key

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """What both sides know of a tensor before it is sent.

    `levels` tells a coder what symbols to expect: integers 0 … levels − 1, or None for any value of the dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    levels: int | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Returns the spec of `tensor`."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class StateUpdate:
    """What a client's encode reports to an adaptive stage's state: its spec and how a cohort's are combined.

    `stack` puts the clients' tensors behind each other along a new first dimension, in the cohort's order.
    """

    spec: TensorSpec
    aggregation: Literal["sum", "min", "max", "stack"]


class EncodingStage(ABC):
    """One step of a chain: a pure function from a tensor to a smaller one, and back.

    Make a stage a frozen dataclass: its `repr`, hence its constructor's arguments, becomes part of the schema
    that both sides must agree on. All a stage may use beside its input is those arguments and the key.
    `decode` sees only what travelled (`y` and `side`), the agreed `spec` of the original, and the key.

    A stage declares what it can do; each claim is tested:
    lossless: decode(encode(x)) == x.
    unbiased: the mean of decode(encode(x)) over keys is x.
    commutes_with_sum: with the same key, decode(encode(x) + encode(y)) == decode(encode(x)) + decode(encode(y)).
    """

    lossless: bool = False
    unbiased: bool = False
    commutes_with_sum: bool = False

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Returns the specs of the side values for an input of `spec`; they travel exact, in this order."""
        return {}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Returns the spec of what `encode` makes of an input of `spec`; its length may depend on `side`.

        On the receiving side `side` comes from the wire: raise ValueError for values that `encode` never makes.
        """
        return spec

    @abstractmethod
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """Returns the encoded tensor and its side values. `x` is finite and must not be changed."""

    @abstractmethod
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """Returns the approximation of the `x` of `spec` that `encode` was given.

        Raises ValueError for values that `encode` never makes.
        """


class AdaptiveEncodingStage(ABC):
    """An encoding stage that learns over the rounds from state which the server keeps.

    Each round the server sends `params(state)` to the clients, in the broadcast, where they are counted. Each
    client's `encode` may report tensors (`update_spec`), which travel exact in its upload, are combined over the
    cohort as declared, and give the next state. Otherwise as EncodingStage.
    """

    lossless: bool = False
    unbiased: bool = False
    commutes_with_sum: bool = False

    @abstractmethod
    def initial_state(self, spec: TensorSpec) -> Tensors:
        """Returns the state before the first round, for a tensor that enters the chain with `spec`."""

    @abstractmethod
    def params(self, state: Tensors) -> Tensors:
        """Returns what encode and decode need this round; shapes and dtypes are the same every round."""

    @abstractmethod
    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """Returns the next round's state. Not called in a round that has no reports."""

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """Returns what `encode` reports for a tensor that enters the chain with `spec`, in this order."""
        return {}

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """As EncodingStage.side_spec."""
        return {}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """As EncodingStage.encoded_spec."""
        return spec

    @abstractmethod
    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """Returns the encoded tensor, its side values, and the state-update tensors."""

    @abstractmethod
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        """As EncodingStage.decode, with this round's params."""
