"""Rounded singular vectors send the common part of a matrix's rows first, in few numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders import CABAC, Coder
from fedq.encoding.numerics import saturate, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.random_numbers import random_signs
from fedq.encoding.stages.step import rate_distortion
from fedq.errors import check_range
from fedq.keys import Key

_SPARE = 8  # extra directions in the search, because the last directions are the least exact (Halko 2011, §4.2)
_MOST = 1 << 30  # steps from 0
_BOTH = ("left", "right")
_EXACT = 128  # rows or columns, up to which all singular vectors are computed


@dataclass(frozen=True)
class SingularVectors(EncodingStage):
    """Sends a matrix's leading singular vectors, rounded to multiples of a step; the next stage gets the rest.

    Takes a floating tensor of any shape, as a matrix of its first axis by all others; gives the rest in the same shape.
    A client's update of a dense layer is a sum of few outer products, one for each of its examples. Updates over many
    rounds have few directions too. k directions are k · (rows + columns) numbers instead of rows · columns.

    A power iteration from random signs finds the vectors (after Halko 2011, algorithm 4.3). The number of vectors
    minimises an estimate of the bits of vectors and rest. A normal number of variance v with the squared error d =
    step² / 12 counts as log₂(1 + v / d) / 2 bits. So a smaller step sends more vectors. The longer vector of each pair,
    times the singular value, is rounded to multiples of `step`. The shorter vector is fitted to the rounded vector, and
    rounded too. Each rounded number then adds step² / 12 to the squared error, as an element of the matrix would. Side
    values are the rounded numbers, coded by CABAC.

    If the rest is decoded exactly, the tensor is decoded exactly, except for floating-point rounding. If
    StepQuantization with the same absolute step follows this stage, vectors and rest have the same error.

    step: in the tensor's unit, from 1e-37.
    rank: the largest number of vectors, 1 to 256.
    rate_weight: see StepQuantization.
    """

    side_coders: ClassVar[Mapping[str, Coder]] = dict.fromkeys(("values", *_BOTH), CABAC())

    step: float
    rank: int = 32
    rate_weight: float = 0.0

    def __post_init__(self) -> None:
        check_range("step", self.step, 1e-37)
        check_range("rank", self.rank, 1, 256, integer=True)
        check_range("rate_weight", self.rate_weight, 0)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The singular values in steps, and the vectors as rows, in integers. 0 means that a vector is not sent."""
        working_dtype(self, spec)
        rows, columns = spec.matrix
        if min(rows, columns) < 2:  # a vector has one row only
            return {}
        rank = min(self.rank, rows, columns)
        shapes = {"values": (rank,), "left": (rank, rows), "right": (rank, columns)}
        return {name: TensorSpec(shape, torch.int32) for name, shape in shapes.items()}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The same spec. Raises ValueError for side values that `encode` never makes."""
        if side:
            sent = int(side["values"].count_nonzero())
            if not bool((side["values"][:sent] > 0).all()) or any(bool(side[name][sent:].any()) for name in _BOTH):
                raise ValueError("there are vectors without a singular value, or one below 0")
        return spec

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        spec = TensorSpec.of(x)
        side = {name: torch.zeros(own.shape, dtype=own.dtype) for name, own in self.side_spec(spec).items()}
        if not side:
            return x, side
        matrix = x.reshape(spec.matrix).to(working_dtype(self, spec))
        energy = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
        norm, limit = math.sqrt(energy), math.sqrt(torch.finfo(matrix.dtype).max)
        if not norm < min(limit, self.step * _MOST):
            raise ValueError(f"a norm of {norm} is too large, or too large for steps of {self.step}")
        if norm < self.step:  # no singular vector saves bits
            return x, side
        flipped, names = (matrix.t(), _BOTH[::-1]) if spec.matrix[0] > spec.matrix[1] else (matrix, _BOTH)
        values, vectors = _leading(flipped, self.rank, key)  # `flipped` has no more rows than columns
        count = self._count(values, energy, *flipped.shape)
        if not count:
            return x, side
        size = (values[:count] / self.step).round_().clamp_(min=1)
        long = self._rounded(vectors[:count] * (size * self.step)[:, None])
        short = self._rounded(_fitted(long.to(matrix) / size[:, None], flipped))
        for name, tensor in zip(("values", *names), (size, short, long), strict=True):
            side[name][:count] = tensor.cpu()
        left, right = self._factors(side, matrix)
        rest = torch.addmm(matrix, left, right, alpha=-1).view(x.shape).to(x.dtype)
        if x.dtype == torch.float16 and not bool(rest.isfinite().all()):
            return x, {name: torch.zeros_like(tensor) for name, tensor in side.items()}
        return rest, side

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        if not side or not side["values"].any():
            return y
        work = y.reshape(spec.matrix).to(working_dtype(self, spec))
        left, right = self._factors(side, work)
        return saturate(torch.addmm(work, left, right), spec.dtype).view(spec.shape)

    def _factors(self, side: Tensors, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two matrices whose product is the sum of all outer products sent; it is finite."""
        sent, limit = int(side["values"].count_nonzero()), torch.finfo(like.dtype).max
        size, left, right = (side[name][:sent].double() for name in ("values", *_BOTH))
        # a sum of 256 products with 32-bit numbers stays below the limit
        right.mul_((self.step / size)[:, None]).clamp_(-limit * 2.0**-40, limit * 2.0**-40)
        return left.to(like).t(), right.to(like)

    def _count(self, values: Tensor, energy: float, rows: int, columns: int) -> int:
        """Returns the number of singular vectors for which vectors and rest take the fewest bits."""
        noise = self.step**2 / 12
        squares = values.double().cpu()[: min(self.rank, rows)].square()
        left = (energy - squares.cumsum(0)).clamp_(min=0)
        one, other = (n * torch.log2(1 + squares / (n * noise)) for n in (rows, columns))
        left = torch.cat((torch.tensor([energy], dtype=torch.float64), left))
        rest = rows * columns * torch.log2(1 + left / (rows * columns * noise))
        bits = rest + torch.cat((torch.zeros(1), (one + other).cumsum(0)))
        return int(bits.argmin())

    def _rounded(self, vectors: Tensor) -> Tensor:
        vectors = vectors.clamp(-_MOST * self.step, _MOST * self.step)
        if self.rate_weight:
            return rate_distortion(vectors, self.step, self.rate_weight)[0]
        return (vectors / self.step).round_().int()


def _leading(matrix: Tensor, rank: int, key: Key) -> tuple[Tensor, Tensor]:
    """Returns approximations of the `rank` largest singular values, largest first, and right singular vectors as rows.

    `matrix` has no more rows than columns. The error of float32 values is float32's precision times the largest.
    """
    rows, count = matrix.shape[0], rank + _SPARE
    if rows <= max(_EXACT, count):
        small = matrix
    else:
        draws = random_signs(count * rows, key.fold("sketch"), matrix.device).view(count, rows).to(matrix) / rows
        # products with the matrix and its transpose amplify the larger directions; fitting the other vectors corrects
        # the rest
        small = torch.linalg.qr(matrix @ (draws @ matrix).t()).Q.t() @ matrix
    # in float64: some libraries' eigenvalues of a float32 matrix of lower rank do not converge
    wide = small.double()
    squares, turn = torch.linalg.eigh(wide @ wide.t())
    values = squares.clamp_(min=0).sqrt_().flip(0)[:rank]
    vectors = turn.flip(1)[:, :rank].t() @ wide / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None]
    return values.to(matrix), vectors.to(matrix)


def _fitted(directions: Tensor, matrix: Tensor) -> Tensor:
    """Returns the rows whose outer products with the rows of `directions` approximate `matrix` best."""
    wide = directions.double()
    gram = wide @ wide.t()
    # directions may be equal, or 0
    gram.diagonal().add_(1e-6 * float(gram.diagonal().max()) + torch.finfo(gram.dtype).tiny)
    fitted: Tensor = torch.linalg.solve(gram, (directions @ matrix.t()).double())
    return fitted.to(matrix).contiguous()
