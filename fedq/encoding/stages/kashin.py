"""Kashin's representation: more numbers than the tensor has elements, and no large number."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import LARGEST_BLOCK, exact_divide, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.random_numbers import random_signs
from fedq.encoding.stages.rotation import check_power_of_two, decoded, hadamard_
from fedq.errors import check_range
from fedq.keys import Key

_CHUNK = 1 << 18  # coefficients at a time, which stay in the cache


@dataclass(frozen=True)
class KashinRepresentation(EncodingStage):
    """Writes a tensor as a sum of more vectors than dimensions, with small coefficients (Lyubarskii, Vershynin 2010).

    Takes a floating tensor of n elements; gives N coefficients (N,) in float32, or float64 for float64. N is
    redundancy · n, rounded up to whole blocks. Elements are dealt out to the blocks in turn. A block's frame is a
    random choice of the Hadamard matrix's columns, with random signs. The coefficients are clipped at
    ‖block‖ / √(delta · B). The rest is written in the frame again and clipped at `eta` times the limit, and so on. The
    last iteration does not clip, so the inverse is exact except for rounding errors (Caldas 2018). The defaults are
    TensorFlow Model Optimization's, whose delta counts the dimensions before the redundancy.

    No coefficient of B is beyond K · ‖block‖ / √B. In theory K ≤ 1 / ((1 − eta) · √delta) after many iterations. For
    normal values in blocks of 1,024, K is 2.8 on average at redundancy 4/3 and 2.4 at 2. The rotation alone has 3.5.
    With 15 iterations, eta 0.7 and delta 3, K is 2.0 and 1.8. The squared error of quantised coefficients is divided by
    the redundancy. At equal bits, the stage beats the rotation alone only with 15 iterations, eta 0.7 and delta 3: by a
    fifth at 3 bits an element. The stage spreads no value beyond its block. For tensors with few large values put a
    HadamardRotation first.

    redundancy: coefficients an element, 1 to 64.
    iterations: 1 or more.
    eta: ratio of each clipping limit to the one before, between 0 and 1.
    delta: above 0; the first limit is proportional to 1/√delta.
    block: B, a power of two up to 16,384; smaller for a small tensor.
    shared: see Rotation.
    """

    redundancy: float = 4 / 3
    iterations: int = 3
    eta: float = 0.9
    delta: float = 1.0
    block: int = 1024
    shared: bool = True

    unbiased = True

    def __post_init__(self) -> None:
        check_range("redundancy", self.redundancy, 1, 64)
        check_range("iterations", self.iterations, 1, integer=True)
        check_range("eta", self.eta, above=0, below=1)
        check_range("delta", self.delta, above=0)
        check_range("block", self.block, 1, LARGEST_BLOCK, integer=True)
        check_power_of_two("block", self.block)

    @property
    def commutes_with_sum(self) -> bool:
        """True if all clients have the same frame."""
        return self.shared

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The coefficients as a vector."""
        blocks, size, _ = self._blocks(spec.numel)
        return TensorSpec((blocks * size,), working_dtype(self, spec))

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        blocks, size, own = self._blocks(x.numel())
        flat = x.reshape(-1).to(working_dtype(self, TensorSpec.of(x)))
        rows = torch.nn.functional.pad(flat, (0, blocks * own - len(flat))).view(own, blocks).t()
        signs, columns = self._frame(x.numel(), key, x.device)
        others = torch.ones(size, dtype=torch.bool, device=x.device).index_fill_(0, columns, False)
        y = flat.new_zeros(blocks, size)
        for some in _chunks(blocks, size):
            part = y[some]
            left = torch.zeros_like(part).index_copy_(1, columns, rows[some] * signs[some])
            level = exact_divide(left.norm(dim=1, keepdim=True), math.sqrt(self.delta * size))
            hadamard_(left)
            for _ in range(self.iterations - 1):
                clipped = left.clamp(-level, level)
                part += clipped
                # project the rest on the frame
                hadamard_(left.sub_(clipped))
                hadamard_(left.masked_fill_(others, 0))
                level *= self.eta
            part += left
        return y.view(-1), {}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        blocks, size, own = self._blocks(spec.numel)
        signs, columns = self._frame(spec.numel, key, y.device)

        def inverse(y: Tensor) -> Tensor:
            x = y.new_empty(blocks, own)
            for some in _chunks(blocks, size):
                part = y.view(blocks, size)[some].clone()
                hadamard_(part)
                torch.mul(part[:, columns], signs[some], out=x[some])
            return x.t().reshape(-1)[: spec.numel]

        return decoded(inverse, y, spec)

    def _blocks(self, n: int) -> tuple[int, int, int]:
        """Returns the number of blocks of a tensor of n elements, and the coefficients and elements in each."""
        wanted = math.ceil(self.redundancy * n)
        size = min(self.block, 1 << (max(wanted, 1) - 1).bit_length())
        blocks = -(-wanted // size)
        return blocks, size, -(-n // max(blocks, 1))

    def _frame(self, n: int, key: Key, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the signs of the elements, by block, and the columns of the Hadamard matrix in the frame."""
        blocks, size, own = self._blocks(n)
        key = key.shared() if self.shared else key
        columns = torch.from_numpy(key.fold("columns").permutation(size)[:own])
        signs = random_signs(blocks * own, key.fold("signs"), device)
        return signs.view(blocks, own), columns.to(device)


def _chunks(blocks: int, size: int) -> list[slice]:
    """Returns slices of blocks that fit into the cache."""
    step = max(1, _CHUNK // size)
    return [slice(start, start + step) for start in range(0, blocks, step)]
