"""Matrices of low rank: the bytes grow with the sides of a matrix, not with its area."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.adaptive import StateUpdate
from fedq.encoding.numerics import exact_divide, largest_magnitude, saturate, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.errors import check_range
from fedq.keys import Key


@dataclass(frozen=True)
class PowerSGD(AdaptiveEncodingStage):
    """Sends a matrix as the product of two thin factors, found by one step of power iteration (Vogels 2019).

    Takes a floating tensor of any shape and reshapes it to a matrix M: its first dimensions by the others. The split
    makes the sum of both sides smallest. Gives both factors as one vector of rank × (rows + columns) values, in float64
    for a float64 tensor, else in float32. Both factors have the same largest magnitude: a quantiser may follow. The
    stage does not change vectors, or matrices that the factors would not make smaller. Put the stage first in a chain,
    or after stages that keep the shape.

    Let M have no more rows than columns, and Q be a basis of `rank` rows, which the server sends. Then P =
    orthonormalised Q·M and S = P·Mᵀ. The decoder returns Sᵀ·P, the projection of M on the rows of P. The result is M
    itself if the rank of M is at most `rank`. Clients report S, scaled to magnitude 1; the next Q is the
    orthonormalised sum of their reports. The error of a constant M falls every round, to the error of the truncated
    singular value decomposition. The first Q is random. Only the span of Q matters. Q and S are sent in float16: 2 ×
    rank × shorter side bytes each way.

    Biased. The paper adds each worker's error to its next gradient. Here clients are sampled too seldom for such
    feedback.

    rank: 1 or more.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        check_range("rank", self.rank, 1, integer=True)

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Both factors as one vector, or the unchanged tensor."""
        rows, columns = _matrix(self, self.rank, spec, sum)
        return TensorSpec((self.rank * (rows + columns),), working_dtype(self, spec)) if rows else spec

    def initial_state(self, spec: TensorSpec) -> dict[str, Tensor]:
        """A random basis, the same in every run."""
        shape = (self.rank, min(_matrix(self, self.rank, spec, sum)))
        bits = torch.from_numpy(Key(0).fold("PowerSGD").bits(math.prod(shape), 16).astype("i2"))
        return {"basis": (bits / 2**15).half().view(shape)}

    def params(self, state: Tensors) -> Tensors:
        """The basis."""
        return state

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """S, scaled to magnitude 1."""
        shape = (self.rank, min(_matrix(self, self.rank, spec, sum)))
        return {"basis": StateUpdate(TensorSpec(shape, torch.float16), "sum")}

    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """The orthonormalised sum, or the old basis if the sum is zero or not finite."""
        total = aggregated["basis"].float()
        return {"basis": _orthonormal(total).half()} if 0 < float(total.abs().sum()) < math.inf else state

    @override
    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        spec = TensorSpec.of(x)
        (rows, columns), basis = _matrix(self, self.rank, spec, sum), params["basis"]
        if not rows:
            return x, {}, {"basis": basis}
        work = working_dtype(self, spec)
        y, report = x.new_zeros(self.rank * (rows + columns), dtype=work), torch.zeros_like(basis)
        if top := largest_magnitude(x):
            matrix = exact_divide(x.contiguous().view(rows, columns).to(work), top)
            lying = matrix if rows <= columns else matrix.t()
            long = _orthonormal(basis.to(lying) @ lying)
            short = long @ lying.t()
            if peak := largest_magnitude(short):
                report = exact_divide(short, peak).half()
                balance = math.sqrt(peak / largest_magnitude(long))
                short, long = short * (math.sqrt(top) / balance), long * (math.sqrt(top) * balance)
                y = torch.cat([f.reshape(-1) for f in ((short, long) if rows <= columns else (long, short))])
        return y, {}, {"basis": report}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        rows, columns = _matrix(self, self.rank, spec, sum)
        if not rows:
            return y.clone()
        left, right = y[: self.rank * rows], y[self.rank * rows :]
        # products of the largest values may overflow even if their sum does not
        peak = largest_magnitude(left) or 1.0
        product: Tensor = exact_divide(left.view(-1, rows), peak).t() @ right.view(-1, columns)
        return saturate(product.mul_(peak), spec.dtype).view(spec.shape)


@dataclass(frozen=True)
class RandomSubspace(EncodingStage):
    """Sends a matrix's projection on a random subspace of `rank` dimensions (after Konečný 2016, §2).

    Takes a floating tensor of any shape and reshapes it to a matrix, as PowerSGD does. The key deals the longer side's
    rows (or columns) evenly to `rank` groups, each row with a random sign. The mean of each group is sent: rank ×
    shorter side values, in float64 for a float64 tensor, else in float32. The groups' signed indicators are orthogonal,
    so this is a projection on a random basis, in one pass for any rank. All clients of a round share the groups. In the
    paper each client has its own groups. The stage does not change vectors, or matrices that the means would not make
    smaller.

    rank: the number of groups, 1 or more.
    scale: True multiplies the decoded rows by the size of their group. This is unbiased, with a mean squared error of
        (n / rank − 1)·|x|² for n rows. False is for clients that train within the subspace (LocalTraining's
        `structured`). A tensor in the subspace is then decoded exactly, and the squared error of others is (1 − rank /
        n)·|x|².
    """

    rank: int = 32
    scale: bool = True

    commutes_with_sum = True

    def __post_init__(self) -> None:
        check_range("rank", self.rank, 1, integer=True)

    @property
    def unbiased(self) -> bool:
        """True with `scale`."""
        return self.scale

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The groups' means as a matrix, or the unchanged tensor."""
        rows, columns = _matrix(self, self.rank, spec, min)
        shape = (self.rank, columns) if rows >= columns else (rows, self.rank)
        return TensorSpec(shape, working_dtype(self, spec)) if rows else spec

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        spec = TensorSpec.of(x)
        rows, columns = _matrix(self, self.rank, spec, min)
        if not rows:
            return x, {}
        encoded = self.encoded_spec(spec, {})
        dim, group, sign, size = self._deal(rows, columns, key, encoded.dtype, x.device)
        means = torch.zeros(encoded.shape, dtype=encoded.dtype, device=x.device)
        return means.index_add_(dim, group, x.reshape(rows, columns) * (sign / size)), {}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        rows, columns = _matrix(self, self.rank, spec, min)
        if not rows:
            return y.clone()
        dim, group, sign, size = self._deal(rows, columns, key, y.dtype, y.device)
        x = y.index_select(dim, group).mul_(sign * size if self.scale else sign)
        return saturate(x, spec.dtype).view(spec.shape)

    def _deal(
        self, rows: int, columns: int, key: Key, dtype: torch.dtype, device: torch.device
    ) -> tuple[int, Tensor, Tensor, Tensor]:
        """Returns the longer dimension, and for each of its indices the group, the sign and the group's size."""
        dim, n = (0, rows) if rows >= columns else (1, columns)
        place = torch.from_numpy(key.shared().fold("groups").permutation(n)).to(device)
        bits = torch.from_numpy(key.shared().fold("signs").bits(n, 8) & 1).to(device)
        group = place % self.rank
        size = n // self.rank + (group < n % self.rank).to(dtype)
        shape = (n, 1) if dim == 0 else (1, n)
        return dim, group, (bits.to(dtype) * 2 - 1).view(shape), size.view(shape)


def _matrix(stage: object, rank: int, spec: TensorSpec, sides: Callable[[tuple[int, int]], int]) -> tuple[int, int]:
    """Returns the rows and columns of the matrix for a tensor of `spec`, or (0, 0) for an unchanged tensor.

    A tensor is unchanged if rank × `sides` of rows and columns, in the stage's working dtype, take no fewer bytes.
    """
    size = working_dtype(stage, spec).itemsize
    splits = [(math.prod(spec.shape[:i]), math.prod(spec.shape[i:])) for i in range(1, len(spec.shape))]
    view = min(splits, key=sum, default=(0, 0))
    return view if rank * sides(view) * size < spec.numel * spec.dtype.itemsize else (0, 0)


def _orthonormal(rows: Tensor) -> Tensor:
    """Returns orthonormal rows with the signs of `rows`; the first k span the same space as the first k of `rows`."""
    q, r = torch.linalg.qr(rows.t())
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed.t().contiguous()
