"""The interface of a coder: symbols ↔ bytes."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.schema import TensorSpec

Buffer = bytes | memoryview


class Coder(ABC):
    """Turns the last stage's tensor into bytes, without loss. Make a coder a frozen dataclass."""

    needs_levels: ClassVar[bool] = False
    """Whether the coder refuses symbols without levels. Such a coder needs a stage before it."""

    def size(self, spec: TensorSpec) -> int | None:
        """Returns the bytes of a tensor of `spec`, or None (the default) if they depend on the values."""
        return None

    @abstractmethod
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        """Returns the bytes of `symbols`, a tensor of `spec` on any device. They may share its memory."""

    @abstractmethod
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """Returns the tensor of `spec`, on the CPU. Raises ValueError for bytes that `encode` never makes."""

    def model_size(self, data: memoryview) -> int:
        """Returns how many bytes of `data`, from `encode`, hold the model (a table, parameters) and not the symbols."""
        return 0


def limits(spec: TensorSpec, most: int = 2**31 - 1) -> tuple[int, int]:
    """Returns the smallest and the largest symbol of `spec`, within 32 bits.

    Unsigned symbols reach up to `most`. Raises ValueError for a dtype without integers.
    """
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        raise ValueError(f"an entropy coder takes integers, not {spec.dtype}")
    levels = 2 if spec.levels is None and spec.dtype == torch.bool else spec.levels
    if levels is not None:
        return 0, min(levels - 1, most)
    info = torch.iinfo(spec.dtype)
    return max(info.min, -(2**31)), min(info.max, 2**31 - 1 if info.min else most)


def checked(symbols: Tensor, low: int, high: int) -> np.ndarray:
    """Returns the symbols as a vector on the CPU. Raises ValueError for a symbol that is not from `low` to `high`."""
    values: np.ndarray = symbols.reshape(-1).cpu().numpy()
    every = values.dtype == np.int32 and (low, high) == (-(2**31), 2**31 - 1)  # the dtype has no others
    if len(values) and not every and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"a symbol is not from {low} to {high}")
    return values
