"""Singular vectors, rounded: what a matrix has in common goes first, in few numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.encoding.coders import CABAC, Coder
from fedq.encoding.numerics import saturate, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.rotation import random_signs
from fedq.encoding.stages.step import rate_distortion
from fedq.keys import Key

_SPARE = 8  # more directions than are asked for: the last ones found are the least exact (Halko 2011, §4.2)
_MOST = 1 << 30  # steps from 0
_BOTH = ("left", "right")
_EXACT = 128  # rows, or columns, up to which all singular vectors are found


@dataclass(frozen=True)
class SingularVectors(EncodingStage):
    """Sends a matrix's leading singular vectors, rounded to multiples of a step, and leaves the rest to the next stage.

    Takes a floating tensor of any shape, as a matrix of its first axis by all others; gives what is left of it, in the
    same shape. A client's update of a dense layer is a sum of few outer products, one for each of its examples, and
    what many rounds add up to has few directions too: k of them are k · (rows + columns) numbers instead of rows ·
    columns. They are found by a power iteration from random signs (after Halko 2011, algorithm 4.3). How many are sent,
    up to `rank`, is chosen so that the bits of all, with those of what is left, are fewest: for a normal variable of
    variance v and a squared error d both count as log₂(1 + v / d) / 2, with d = step² / 12. So more are sent the
    smaller the step. The longer of each pair of vectors, times its singular value, is rounded to multiples of `step`,
    and the shorter is fitted to what came of that, and rounded too: each number then adds step² / 12 to the squared
    error, as if it were an element of the matrix itself. Side values are the rounded numbers, coded by CABAC.

    Exact, but for rounding errors of floating-point arithmetic, if what it gives is. Combined with StepQuantization of
    the same `step`, not relative, behind it, errors in both are alike.

    step: in the tensor's unit, above 0. rank: 1 to 256. rate_weight: as StepQuantization's.
    """

    step: float
    rank: int = 32
    rate_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 1e-37 <= self.step < math.inf:
            raise ValueError(f"step must be from 1e-37 and finite, not {self.step}")
        if not 1 <= self.rank <= 256:
            raise ValueError(f"rank must be from 1 to 256, not {self.rank}")
        if not 0 <= self.rate_weight < math.inf:
            raise ValueError(f"rate_weight must be 0 or more, not {self.rate_weight}")

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The singular values in steps, and the vectors a row each, in integers; 0 for those that are not sent."""
        working_dtype(self, spec)
        rows, columns = spec.matrix
        if min(rows, columns) < 2:  # a vector is its own singular vector
            return {}
        rank = min(self.rank, rows, columns)
        shapes = {"values": (rank,), "left": (rank, rows), "right": (rank, columns)}
        return {name: TensorSpec(shape, torch.int32) for name, shape in shapes.items()}

    def side_coder(self, name: str) -> Coder:
        """As Stage.side_coder."""
        return CABAC()

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The same; raises ValueError for side values that `encode` does not give."""
        if side:
            sent = int(side["values"].count_nonzero())
            if not bool((side["values"][:sent] > 0).all()) or any(bool(side[name][sent:].any()) for name in _BOTH):
                raise ValueError("there are vectors without a singular value, or one below 0")
        return spec

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        spec = TensorSpec.of(x)
        side = {name: torch.zeros(own.shape, dtype=own.dtype) for name, own in self.side_spec(spec).items()}
        if not side:
            return x, side
        matrix = x.reshape(spec.matrix).to(working_dtype(self, spec))
        energy = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
        norm, limit = math.sqrt(energy), math.sqrt(torch.finfo(matrix.dtype).max)
        if not norm < min(limit, self.step * _MOST):
            raise ValueError(f"a norm of {norm} is too large, or too large for steps of {self.step}")
        if norm < self.step:  # no singular value is worth its bits
            return x, side
        flipped, names = (matrix.t(), _BOTH[::-1]) if spec.matrix[0] > spec.matrix[1] else (matrix, _BOTH)
        values, vectors = _leading(flipped, self.rank, key)  # of no more rows than columns
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

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        if not side or not side["values"].any():
            return y
        work = y.reshape(spec.matrix).to(working_dtype(self, spec))
        left, right = self._factors(side, work)
        return saturate(torch.addmm(work, left, right), spec.dtype).view(spec.shape)

    def _factors(self, side: Tensors, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two matrices whose product is the sum of what is sent; it is finite."""
        sent, limit = int(side["values"].count_nonzero()), torch.finfo(like.dtype).max
        size, left, right = (side[name][:sent].double() for name in ("values", *_BOTH))
        # 256 products of 32 bits and this are still below the limit
        right.mul_((self.step / size)[:, None]).clamp_(-limit * 2.0**-40, limit * 2.0**-40)
        return left.to(like).t(), right.to(like)

    def _count(self, values: Tensor, energy: float, rows: int, columns: int) -> int:
        """Returns how many singular vectors take the fewest bits, with what is then left."""
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
    """Returns about the `rank` largest singular values, largest first, and the right singular vectors as rows.

    `matrix` has no more rows than columns. Numbers of a float32 are off by its precision of the largest.
    """
    rows, count = matrix.shape[0], rank + _SPARE
    if rows <= max(_EXACT, count):
        small = matrix
    else:
        draws = random_signs(count * rows, key.fold("sketch"), matrix.device).view(count, rows).to(matrix) / rows
        # the products with the matrix and its transpose make the larger directions stand out; what is still wrong is
        # made good where the other vectors are fitted
        small = torch.linalg.qr(matrix @ (draws @ matrix).t()).Q.t() @ matrix
    # some libraries' eigenvalues of a float32 matrix of lower rank do not converge
    wide = small.double()
    squares, turn = torch.linalg.eigh(wide @ wide.t())
    values = squares.clamp_(min=0).sqrt_().flip(0)[:rank]
    vectors = turn.flip(1)[:, :rank].t() @ wide / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None]
    return values.to(matrix), vectors.to(matrix)


def _fitted(directions: Tensor, matrix: Tensor) -> Tensor:
    """Returns the vectors, a row each, whose outer products with the rows `directions` come nearest to `matrix`."""
    wide = directions.double()
    gram = wide @ wide.t()
    # some may be alike, or 0
    gram.diagonal().add_(1e-6 * float(gram.diagonal().max()) + torch.finfo(gram.dtype).tiny)
    fitted: Tensor = torch.linalg.solve(gram, (directions @ matrix.t()).double())
    return fitted.to(matrix).contiguous()
