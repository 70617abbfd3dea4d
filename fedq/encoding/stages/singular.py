"""Singular vectors, rounded: what a matrix has in common goes first, in few numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.encoding.coders import CABAC, Coder
from fedq.encoding.spec import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.rotation import random_signs
from fedq.encoding.stages.step import rate_distortion_
from fedq.encoding.stages.sums import largest_magnitude, working_dtype
from fedq.keys import Key

_SPARE = 8  # more directions than are asked for: the last ones found are the least exact (Halko 2011, §4.2)
_EXACT = 128  # rows, or columns, up to which all singular vectors are found


@dataclass(frozen=True)
class SingularVectors(EncodingStage):
    """Sends a matrix's leading singular vectors, rounded to multiples of a step, and leaves the rest to the next stage.

    Takes a floating tensor of any shape, as a matrix of its first axis by all others; gives what is left of it, in the
    same shape. A client's update of a dense layer is a sum of few outer products, one for each of its examples, and
    what many rounds add up to has few directions too: k of them are k · (rows + columns) numbers instead of
    rows · columns. They are found by a randomised subspace iteration (Halko 2011, algorithm 4.4). How many are sent is
    up to `rank`, chosen so that the bits of all, with those of what is left, are fewest: for a normal variable of
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
        rank = min(self.rank, rows, columns)
        if rank < 2:  # a vector is its own singular vector
            return {}
        shapes = {"values": (rank,), "left": (rank, rows), "right": (rank, columns)}
        return {name: TensorSpec(shape, torch.int32) for name, shape in shapes.items()}

    def side_coder(self, name: str) -> Coder:
        """As Stage.side_coder."""
        return CABAC()

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        spec = TensorSpec.of(x)
        side = {name: torch.zeros(own.shape, dtype=own.dtype) for name, own in self.side_spec(spec).items()}
        peak = largest_magnitude(x)
        if not side or peak < self.step:
            return x, side
        if peak * math.sqrt(x.numel()) > self.step * 2**30:
            raise ValueError(f"{peak} is too large for steps of {self.step}")
        matrix = x.reshape(spec.matrix).to(working_dtype(self, spec))
        flipped = matrix.t() if spec.matrix[0] > spec.matrix[1] else matrix  # no more rows than columns
        names = ("right", "left") if spec.matrix[0] > spec.matrix[1] else ("left", "right")
        values, vectors = _leading(flipped, self.rank + _SPARE, key)
        count = self._count(values, float(torch.linalg.vector_norm(matrix)) ** 2, *flipped.shape)
        if not count:
            return x, side
        size = (values[:count] / self.step).round_().clamp_(min=1).int()
        long = self._rounded(vectors[:count] * size[:, None] * self.step)
        directions = long.to(matrix) / size[:, None]
        some = long.any(1)
        fitted = torch.zeros(count, len(flipped), dtype=matrix.dtype, device=matrix.device)
        # least squares: the short vectors that fit the long ones as they are received
        own = directions[some]
        gram = own @ own.t()
        gram.diagonal().add_(1e-6 * float(gram.diagonal().max()) if len(own) else 0)
        fitted[some] = torch.linalg.solve(gram, own @ flipped.t())
        short = self._rounded(fitted)
        for name, tensor in zip(("values", *names), (size, short, long), strict=True):
            side[name][:count] = tensor.cpu()
        return (matrix - self._product(side, matrix)).view(x.shape).to(x.dtype), side

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        if not side:
            return y
        work = y.reshape(spec.matrix).to(working_dtype(self, spec))
        limit = torch.finfo(spec.dtype).max
        return (work + self._product(side, work)).clamp_(-limit, limit).view(spec.shape).to(spec.dtype)

    def _product(self, side: Tensors, like: Tensor) -> Tensor:
        """Returns the sum of the outer products of the vectors as they are received."""
        sent = int(side["values"].count_nonzero())
        size, left, right = (side[name][:sent].to(like) for name in ("values", "left", "right"))
        return (left * self.step).t() @ (right / size[:, None])

    def _count(self, values: Tensor, energy: float, rows: int, columns: int) -> int:
        """Returns how many singular vectors take the fewest bits, with what is then left."""
        noise = self.step**2 / 12
        squares = values.double().cpu()[: min(self.rank, rows)].square()
        left = (energy - squares.cumsum(0)).clamp_(min=0)
        one, other = (n * torch.log2(1 + squares / (n * noise)) for n in (rows, columns))
        rest = rows * columns * torch.log2(1 + torch.cat((torch.tensor([energy]), left)) / (rows * columns * noise))
        bits = rest + torch.cat((torch.zeros(1), (one + other).cumsum(0)))
        return int(bits.argmin())

    def _rounded(self, vectors: Tensor) -> Tensor:
        symbols = (vectors / self.step).round_().int()
        if self.rate_weight:
            rate_distortion_(symbols, vectors, self.step, self.rate_weight)
        return symbols


def _leading(matrix: Tensor, count: int, key: Key) -> tuple[Tensor, Tensor]:
    """Returns about the `count` largest singular values, largest first, and the right singular vectors as rows.

    `matrix` has no more rows than columns. Numbers of a float32 are off by its precision of the largest.
    """
    rows = matrix.shape[0]
    if rows <= max(_EXACT, count):
        small = matrix
    else:
        draws = random_signs(rows * count, key.fold("sketch"), matrix.device).view(rows, count).to(matrix)
        # each product with the matrix and its transpose makes the larger directions stand out more
        basis = torch.linalg.qr(matrix @ (matrix.t() @ draws)).Q
        basis = torch.linalg.qr(matrix @ (matrix.t() @ basis)).Q
        small = basis.t() @ matrix
    squares, turn = torch.linalg.eigh(small @ small.t())
    values = squares.clamp_(min=0).sqrt_().flip(0)[:count]
    vectors = (turn.t() @ small).flip(0)[:count]
    return values, vectors / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None]
