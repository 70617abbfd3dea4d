"""Exact values: the bytes of the tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.coder import Buffer, Coder, checked
from fedq.encoding.schema import TensorSpec


@dataclass(frozen=True)
class Raw(Coder):
    """Every element in its own dtype, little-endian, in row-major order. Takes any dtype; no overhead."""

    def size(self, spec: TensorSpec) -> int:
        """Returns elements × bytes an element."""
        return spec.numel * spec.dtype.itemsize

    @override
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        # as_strided: a tensor of at most one element is contiguous with any stride, but view may refuse the stride
        flat = symbols.cpu().contiguous().as_strided((symbols.numel(),), (1,))
        return flat.view(torch.uint8).numpy().data

    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """Raises ValueError for booleans other than 0 and 1, and for symbols beyond their levels."""
        values = torch.empty(spec.numel * spec.dtype.itemsize, dtype=torch.uint8)
        values.numpy()[:] = data
        if spec.dtype == torch.bool and bool((values > 1).any()):
            raise ValueError("a boolean is neither 0 nor 1")
        decoded = values.view(spec.dtype).reshape(spec.shape)
        if spec.levels is not None:
            checked(decoded, 0, spec.levels - 1)
        return decoded
