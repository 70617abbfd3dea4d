"""Matrices of low rank: what is sent grows with a matrix's sides, not with its area."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.encoding.adaptive import StateUpdate
from fedq.encoding.numerics import exact_divide, largest_magnitude, saturate, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.keys import Key


@dataclass(frozen=True)
class PowerSGD(AdaptiveEncodingStage):
    """Sends a matrix as the product of two thin factors, found by one step of power iteration (Vogels 2019).

    Takes a floating tensor of any shape and sees it as a matrix M, its first dimensions by the others, split where the
    sides' sum is smallest. Gives both factors behind each other: rank × (rows + columns) values, in float64 for a
    float64 tensor, else in float32, of the same largest magnitude, so that a quantiser may follow. Vectors, and
    matrices that this would not make smaller, pass as they are. Stands first in a chain, or behind stages that keep
    the shape.

    Let M lie on its longer side, and the clients be sent a basis Q of `rank` rows as long as the shorter. Then
    P = orthonormalised Q·M, S = P·Mᵀ, and Sᵀ·P is decoded: M projected on the rows of P, which is M itself where its
    rank is at most `rank`. The next Q is the orthonormalised sum of the cohort's S, each scaled to magnitude 1, so that
    the error of a constant M falls every round to that of its truncated singular value decomposition. The first Q is
    random. Only its span matters: it travels in float16 both ways, 2 × rank × shorter side bytes, and is counted.

    Biased. The paper adds each worker's error to its next gradient, for which a client is asked too seldom.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Both factors as one vector; or as it is."""
        rows, columns = _matrix(self, self.rank, spec, sum)
        return TensorSpec((self.rank * (rows + columns),), working_dtype(self, spec)) if rows else spec

    def initial_state(self, spec: TensorSpec) -> dict[str, Tensor]:
        """A basis of random numbers, the same in every run."""
        shape = (self.rank, min(_matrix(self, self.rank, spec, sum)))
        bits = torch.from_numpy(Key(0).fold("PowerSGD").bits(math.prod(shape), 16).astype("i2"))
        return {"basis": (bits / 2**15).half().view(shape)}

    def params(self, state: Tensors) -> Tensors:
        """The basis."""
        return state

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """S, scaled."""
        shape = (self.rank, min(_matrix(self, self.rank, spec, sum)))
        return {"basis": StateUpdate(TensorSpec(shape, torch.float16), "sum")}

    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """The orthonormalised sum; the old basis where that sum is zero, or not finite."""
        total = aggregated["basis"].float()
        return {"basis": _orthonormal(total).half()} if 0 < float(total.abs().sum()) < math.inf else state

    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """As AdaptiveEncodingStage.encode."""
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

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        """As AdaptiveEncodingStage.decode."""
        rows, columns = _matrix(self, self.rank, spec, sum)
        if not rows:
            return y.clone()
        left, right = y[: self.rank * rows], y[self.rank * rows :]
        # of the largest values the products may overflow on the way, though their sum does not
        peak = largest_magnitude(left) or 1.0
        product: Tensor = exact_divide(left.view(-1, rows), peak).t() @ right.view(-1, columns)
        return saturate(product.mul_(peak), spec.dtype).view(spec.shape)


@dataclass(frozen=True)
class RandomSubspace(EncodingStage):
    """Sends a matrix's projection on a random subspace of `rank` dimensions (after Konečný 2016, §2).

    Takes a floating tensor of any shape and sees it as a matrix, as PowerSGD does. The key deals the rows, or the
    columns where these are more, evenly among `rank` groups, with a random sign each; of each group the mean is sent:
    rank × shorter side values, in float64 for a float64 tensor, else in float32. The groups' signed indicators are
    orthogonal, so this is a projection, as with any other random basis, but takes one pass whatever the rank. All
    clients of a round share the groups (there, each has its own). Vectors, and matrices that this would not make
    smaller, pass as they are.

    With n rows, `scale` multiplies what is decoded by each group's size: unbiased, with a squared error of
    (n / rank − 1)·|x|² on average. Without, it is (1 − rank / n)·|x|², and what lies in the subspace comes back as it
    is: that suits clients that train within it (LocalTraining's `structured`).
    """

    rank: int = 32
    scale: bool = True

    commutes_with_sum = True

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    @property
    def unbiased(self) -> bool:
        """True with `scale`."""
        return self.scale

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The groups' means as a matrix; or as it is."""
        rows, columns = _matrix(self, self.rank, spec, min)
        shape = (self.rank, columns) if rows >= columns else (rows, self.rank)
        return TensorSpec(shape, working_dtype(self, spec)) if rows else spec

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        spec = TensorSpec.of(x)
        rows, columns = _matrix(self, self.rank, spec, min)
        if not rows:
            return x, {}
        encoded = self.encoded_spec(spec, {})
        dim, group, sign, size = self._deal(rows, columns, key, encoded.dtype, x.device)
        means = torch.zeros(encoded.shape, dtype=encoded.dtype, device=x.device)
        return means.index_add_(dim, group, x.reshape(rows, columns) * (sign / size)), {}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        rows, columns = _matrix(self, self.rank, spec, min)
        if not rows:
            return y.clone()
        dim, group, sign, size = self._deal(rows, columns, key, y.dtype, y.device)
        x = y.index_select(dim, group).mul_(sign * size if self.scale else sign)
        return saturate(x, spec.dtype).view(spec.shape)

    def _deal(
        self, rows: int, columns: int, key: Key, dtype: torch.dtype, device: torch.device
    ) -> tuple[int, Tensor, Tensor, Tensor]:
        """Returns the longer dimension, and of each of its indices the group, its sign and the group's size."""
        dim, n = (0, rows) if rows >= columns else (1, columns)
        place = torch.from_numpy(key.shared().fold("groups").permutation(n)).to(device)
        bits = torch.from_numpy(key.shared().fold("signs").bits(n, 8) & 1).to(device)
        group = place % self.rank
        size = n // self.rank + (group < n % self.rank).to(dtype)
        shape = (n, 1) if dim == 0 else (1, n)
        return dim, group, (bits.to(dtype) * 2 - 1).view(shape), size.view(shape)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, not {rank}")


def _matrix(stage: object, rank: int, spec: TensorSpec, sides: Callable[[tuple[int, int]], int]) -> tuple[int, int]:
    """Returns the rows and columns to see a tensor of `spec` with, or (0, 0) where it passes as it is.

    It does where rank × `sides` of them, in the dtype to work in, are no fewer bytes.
    """
    size = working_dtype(stage, spec).itemsize
    splits = [(math.prod(spec.shape[:i]), math.prod(spec.shape[i:])) for i in range(1, len(spec.shape))]
    view = min(splits, key=sum, default=(0, 0))
    return view if rank * sides(view) * size < spec.numel * spec.dtype.itemsize else (0, 0)


def _orthonormal(rows: Tensor) -> Tensor:
    """Returns orthonormal rows, the first k of which span the first k given; they follow the given ones' signs."""
    q, r = torch.linalg.qr(rows.t())
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed.t().contiguous()
