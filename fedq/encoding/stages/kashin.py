"""Kashin's representation: more numbers than the tensor has, none of them large."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.encoding.numerics import LARGEST_BLOCK, exact_divide, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.rotation import decoded, hadamard_, random_signs
from fedq.keys import Key

_CHUNK = 1 << 18  # coefficients worked on at a time: the working set stays in the cache


@dataclass(frozen=True)
class KashinRepresentation(EncodingStage):
    """Writes a tensor in a frame of more vectors than dimensions, with coefficients that are all small.

    Takes a floating tensor of n elements; gives N numbers (N,) in float32, float64 for float64: `redundancy` · n,
    rounded up to whole blocks, and so much more travels. The elements are dealt out to the blocks in turn, as many to
    each; a block's frame is a random choice of the Hadamard matrix's columns, with random signs. The coefficients are
    clipped at ‖block‖ / √(delta · B); what is then left is written in the frame and clipped at `eta` times that, and so
    on; the last of the `iterations` is not clipped, so that the inverse is exact but for rounding, as a rotation's
    (Lyubarskii & Vershynin 2010; Caldas 2018; the first defaults are TensorFlow Model Optimization's, whose delta
    counts the dimensions before the redundancy).

    Of B coefficients none is beyond K·‖block‖/√B, with K ≤ 1/((1 − eta)·√delta) after many iterations in theory. In
    blocks of 1024 of Gaussian values, K is 2.8 on average at redundancy 4/3 (2.4 at 2), where the rotation alone has
    3.5; 15 iterations with eta 0.7 and delta 3 reach 2.0 (1.8). Error that quantisation makes of the coefficients is
    divided by the redundancy. At equal bits it beats the rotation alone with the latter constants only, by a fifth at 3
    bits an element. It spreads nothing beyond a block: with few large values, put a HadamardRotation before it.

    redundancy: 1 to 64. block: B, a power of two up to 16,384; fewer in a small tensor. shared: see Rotation.
    """

    redundancy: float = 4 / 3
    iterations: int = 3
    eta: float = 0.9
    delta: float = 1.0
    block: int = 1024
    shared: bool = True

    unbiased = True

    def __post_init__(self) -> None:
        if not 1 <= self.redundancy <= 64:
            raise ValueError(f"redundancy must be from 1 to 64, not {self.redundancy}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be 1 or more, not {self.iterations}")
        if not 0 < self.eta < 1:
            raise ValueError(f"eta must be between 0 and 1, not {self.eta}")
        if not 0 < self.delta < math.inf:
            raise ValueError(f"delta must be positive, not {self.delta}")
        if not 1 <= self.block <= LARGEST_BLOCK or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two up to {LARGEST_BLOCK}, not {self.block}")

    @property
    def commutes_with_sum(self) -> bool:
        """True where all clients have the same frame."""
        return self.shared

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The coefficients, in a row."""
        blocks, size, _ = self._blocks(spec.numel)
        return TensorSpec((blocks * size,), working_dtype(self, spec))

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
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
                # what the clipped coefficients left, in the frame: a projection
                hadamard_(left.sub_(clipped))
                hadamard_(left.masked_fill_(others, 0))
                level *= self.eta
            part += left
        return y.view(-1), {}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
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
        """Returns the number of blocks of a tensor of n, the coefficients and the elements in each."""
        wanted = math.ceil(self.redundancy * n)
        size = min(self.block, 1 << (max(wanted, 1) - 1).bit_length())
        blocks = -(-wanted // size)
        return blocks, size, -(-n // max(blocks, 1))

    def _frame(self, n: int, key: Key, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the signs of the elements, by block, and the columns of the matrix that the frame has."""
        blocks, size, own = self._blocks(n)
        key = key.shared() if self.shared else key
        columns = torch.from_numpy(key.fold("columns").permutation(size)[:own])
        signs = random_signs(blocks * own, key.fold("signs"), device)
        return signs.view(blocks, own), columns.to(device)


def _chunks(blocks: int, size: int) -> list[slice]:
    """Returns the blocks to work on at a time."""
    step = max(1, _CHUNK // size)
    return [slice(start, start + step) for start in range(0, blocks, step)]
