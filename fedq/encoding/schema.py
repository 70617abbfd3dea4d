"""What both sides know of a tensor before it is sent."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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

    @classmethod
    def symbols(cls, shape: tuple[int, ...], levels: int) -> "TensorSpec":
        """Returns the spec of symbols 0 … levels − 1, in the dtype that every stage gives them: uint8, else int32."""
        return cls(shape, torch.uint8 if levels <= 256 else torch.int32, levels)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns where the tensor is taken for a matrix: the first axis by all others; a vector is a row."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.numel // max(rows, 1)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()
