"""What a coder is: symbols ↔ bytes."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.adaptive import Adaptive
from fedq.encoding.schema import Tensors, TensorSpec

Buffer = bytes | memoryview


class Coder(ABC):
    """Turns the last stage's tensor into bytes, exactly. Make it a frozen dataclass, as a stage."""

    def size(self, spec: TensorSpec) -> int | None:
        """Returns how many bytes a tensor of `spec` takes, or None, as here, where that depends on its values."""
        return None

    @abstractmethod
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        """Returns the bytes of `symbols`, a tensor of `spec` on any device; they may share its memory."""

    @abstractmethod
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """Returns the tensor of `spec` on the CPU. Raises ValueError for bytes that `encode` never makes."""

    def model_size(self, data: memoryview) -> int:
        """Returns how many bytes of `encode`'s `data` tell the model (a table, parameters) and not the symbols."""
        return 0


class AdaptiveCoder(Adaptive):
    """A coder whose model of the symbols is agreed before they travel: it follows the rounds (see Adaptive).

    Its length always depends on the values.
    """

    @abstractmethod
    def encode(self, symbols: Tensor, spec: TensorSpec, params: Tensors) -> tuple[Buffer, Tensors]:
        """As Coder.encode, with this round's params; returns the state-update tensors too."""

    @abstractmethod
    def decode(self, data: memoryview, spec: TensorSpec, params: Tensors) -> Tensor:
        """As Coder.decode, with this round's params."""


def limits(spec: TensorSpec, most: int = 2**31 - 1) -> tuple[int, int]:
    """Returns the least and the greatest symbol that `spec` allows, of 32 bits; where none is below 0, up to `most`.

    Raises ValueError where symbols are no integers.
    """
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        raise ValueError(f"an entropy coder takes integers, not {spec.dtype}")
    levels = 2 if spec.levels is None and spec.dtype == torch.bool else spec.levels
    if levels is not None:
        return 0, min(levels - 1, most)
    info = torch.iinfo(spec.dtype)
    return max(info.min, -(2**31)), min(info.max, 2**31 - 1 if info.min else most)


def checked(symbols: Tensor, low: int, high: int) -> np.ndarray:
    """Returns the symbols, flat and on the CPU. Raises ValueError for one that is not from `low` to `high`."""
    values: np.ndarray = symbols.reshape(-1).cpu().numpy()
    every = values.dtype == np.int32 and (low, high) == (-(2**31), 2**31 - 1)  # there are no others to look for
    if len(values) and not every and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"a symbol is not from {low} to {high}")
    return values
