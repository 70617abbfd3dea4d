"""Codebooks: each element as the number of the nearest of some levels."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.numerics import (
    blocks,
    check_block,
    check_scale,
    exact_divide,
    largest_magnitude,
    sums,
    working_dtype,
)
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up, look_up_scaled, nearest, normal_levels, ordered, quantile_levels
from fedq.keys import Key

_PIECE = 1 << 20  # elements that a histogram counts at a time


class Codebook(EncodingStage):
    """What codebooks of one tensor share: the side values tell the levels, 2^bits or one less.

    Takes a floating tensor of any shape; gives symbols of the same shape.
    """

    bits: int

    @abstractmethod
    def levels(self, side: Tensors, spec: TensorSpec) -> Tensor:
        """Returns the sorted levels (float64). Raises ValueError for side values that `encode` never makes."""

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        return TensorSpec.symbols(spec.shape, len(self.levels(side, spec)))

    @abstractmethod
    def fit(self, x: Tensor, key: Key) -> Tensors:
        """Returns the side values."""

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        side = self.fit(x, key)
        return nearest(x, self.levels(side, TensorSpec.of(x))), side

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        return look_up(y, self.levels(side, spec), spec)


@dataclass(frozen=True)
class LloydMax(Codebook):
    """The 2^bits levels of least squared error for a normal distribution (Lloyd 1957, Max 1960).

    They are scaled to the tensor's mean and standard deviation, two side values. The squared error of a normal
    tensor is 0.3634, 0.1175, 0.03454, 0.009497 … of its variance at 1, 2, 3, 4 … bits; about 2.72 · 4^−bits further
    up. Biased.

    bits: 1 to 8.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        _check_bits(1, self.bits)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Mean and standard deviation: float64 for a float64 tensor, else float32."""
        return dict.fromkeys(("mean", "deviation"), TensorSpec((), working_dtype(self, spec)))

    def levels(self, side: Tensors, spec: TensorSpec) -> Tensor:
        """As Codebook.levels."""
        check_scale(side["mean"].abs(), spec)
        check_scale(side["deviation"], spec)
        limit = torch.finfo(torch.float64).max
        return normal_levels(self.bits).mul(float(side["deviation"])).add_(float(side["mean"])).clamp_(-limit, limit)

    def fit(self, x: Tensor, key: Key) -> Tensors:
        """As Codebook.fit."""
        # in units of the largest, so that a float64's square neither overflows nor underflows
        unit, n, dtype = largest_magnitude(x) or 1.0, max(x.numel(), 1), working_dtype(self, TensorSpec.of(x))
        mean = sums(x, lambda part: exact_divide(part, unit))[0] / n
        variance = sums(x, lambda part: exact_divide(part, unit).sub_(mean).square_())[0] / n
        mean, deviation = torch.tensor([unit * mean, unit * math.sqrt(variance)], dtype=dtype)
        return {"mean": mean, "deviation": deviation}


@dataclass(frozen=True)
class KMeans(Codebook):
    """2^bits levels fitted to the tensor, which travel with it as a side value (Han 2016; Lloyd 1957).

    They start where the density to the power of 1/3 has its quantiles, which is best for many levels (Panter and
    Dite 1951), and then follow Lloyd's iterations, none of which increases the squared error. What they see of the
    tensor is a histogram of all elements, whose cells are as wide as 1/512 of their distance from the mean. Biased.

    bits: 1 to 8. iterations: of Lloyd's.
    """

    bits: int = 4
    iterations: int = 50

    def __post_init__(self) -> None:
        _check_bits(1, self.bits)
        if self.iterations < 0:
            raise ValueError(f"iterations must be 0 or more, not {self.iterations}")

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The sorted levels, in the tensor's own dtype."""
        working_dtype(self, spec)
        return {"levels": TensorSpec((1 << self.bits,), spec.dtype)}

    def levels(self, side: Tensors, spec: TensorSpec) -> Tensor:
        """As Codebook.levels."""
        levels = side["levels"].double()
        if not bool((levels[1:] >= levels[:-1]).all()):
            raise ValueError("the levels are not sorted")
        return levels

    def fit(self, x: Tensor, key: Key) -> Tensors:
        """As Codebook.fit."""
        if x.numel() == 0:
            return {"levels": torch.zeros(1 << self.bits, dtype=x.dtype)}
        # in units of the largest and from the mean, for the histogram's sake
        unit = largest_magnitude(x) or 1.0
        mean = float(np.float32(sums(x, lambda part: exact_divide(part, unit))[0] / x.numel()))
        points, counts = _histogram(x, unit, mean)
        number, totals, squares = (
            np.concatenate(([0.0], values.cumsum())) for values in (counts, points * counts, points**2 * counts)
        )
        # In each of many parts of equal mass, of width w, the density is as 1/w, and the levels' as w^(−1/3).
        edges = points[np.searchsorted(number[1:-1], np.linspace(0, number[-1], 1024))]
        levels_up_to = np.concatenate(([0.0], np.cumsum(np.diff(edges) ** (2 / 3))))
        levels = np.interp((np.arange(1 << self.bits) + 0.5) / (1 << self.bits) * levels_up_to[-1], levels_up_to, edges)
        for _ in range(self.iterations):
            ends = np.concatenate(([0], np.searchsorted(points, (levels[1:] + levels[:-1]) / 2), [len(points)]))
            own = np.diff(number[ends])
            levels, before = np.where(own > 0, np.diff(totals[ends]) / np.maximum(own, 1), levels), levels
            if (empty := np.flatnonzero(own == 0)).size:  # they go to where most of the squared error is
                left = np.maximum(np.diff(squares[ends]) - own * levels**2, 0)
                worst = np.argsort(-left, kind="stable")[: empty.size]
                levels[empty] = levels[worst] + np.sqrt(left[worst] / np.maximum(own[worst], 1))
                levels.sort()
            if np.array_equal(levels, before):
                break
        return {"levels": torch.from_numpy((np.sort(levels) + mean).clip(-1, 1) * unit).to(x.dtype)}


@dataclass(frozen=True)
class Logarithmic(Codebook):
    """0 and ±max |x| · base^−k for k = 0 … 2^(bits−1) − 2 (logarithmic data representation, Miyashita 2016).

    max |x| is a side value. Elements that are not below the least level are off by at most (base − 1) / (base + 1) of
    their magnitude, the others by half the least level. Biased.

    bits: 2 to 8. base: above 1.
    """

    bits: int = 4
    base: float = 2.0

    def __post_init__(self) -> None:
        _check_bits(2, self.bits)
        if not 1 < self.base < math.inf:
            raise ValueError(f"base must be above 1, not {self.base}")

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The largest magnitude, in the tensor's own dtype."""
        working_dtype(self, spec)
        return {"scale": TensorSpec((), spec.dtype)}

    def levels(self, side: Tensors, spec: TensorSpec) -> Tensor:
        """As Codebook.levels."""
        check_scale(side["scale"], spec)
        positive = [float(side["scale"]) * self.base**-k for k in reversed(range((1 << self.bits - 1) - 1))]
        return torch.tensor([-level for level in reversed(positive)] + [0.0] + positive, dtype=torch.float64)

    def fit(self, x: Tensor, key: Key) -> Tensors:
        """As Codebook.fit."""
        return {"scale": torch.tensor(largest_magnitude(x), dtype=x.dtype)}


@dataclass(frozen=True)
class NormalFloat(EncodingStage):
    """2^bits levels at quantiles of a normal distribution, 0 and ±1 among them, a scale a block (NF4, Dettmers 2023).

    Takes a floating tensor of any shape; gives symbols of the same shape, and the largest magnitude of each `block`
    consecutive elements as a side value. Biased; no element is off by more than half the widest gap between levels,
    0.152 of the block's largest magnitude at 4 bits.

    bits: 2 to 8. block: 1 to 16,384.
    """

    bits: int = 4
    block: int = 64

    def __post_init__(self) -> None:
        _check_bits(2, self.bits)
        check_block("block", self.block)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The largest magnitude of each block, in the tensor's own dtype."""
        working_dtype(self, spec)
        return {"scales": TensorSpec((-(-spec.numel // self.block),), spec.dtype)}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["scales"], spec)
        return TensorSpec.symbols(spec.shape, 1 << self.bits)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        levels, scales, start = quantile_levels(self.bits), [x.new_zeros(0)], 0
        symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        out = symbols.view(-1)
        for rows in blocks(x, self.block):
            scale = rows.abs().amax(1, keepdim=True)
            scales.append(scale.view(-1).to(x.dtype))
            part = nearest(rows.div(scale.masked_fill(scale == 0, 1)).view(-1), levels)
            out[start : start + len(part)] = part[: len(out) - start]
            start += len(part)
        return symbols, {"scales": torch.cat(scales).cpu()}

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        return look_up_scaled(y, quantile_levels(self.bits), side["scales"], self.block, spec)


def _histogram(x: Tensor, unit: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means of x/unit − mean in each cell that is not empty, in order, and how many elements it has.

    A cell is what the upper 18 bits of a float32 have in common: sign, exponent, 9 bits of the mantissa.
    """
    counts = torch.zeros(1 << 18, dtype=torch.float64, device=x.device)
    totals, flat = counts.clone(), x.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        part = flat[start : start + _PIECE].to(torch.promote_types(x.dtype, torch.float32))
        part = exact_divide(part, unit).float().sub_(mean)
        cells = ordered(part.view(torch.int32) >> 14, 18)
        counts += torch.bincount(cells, minlength=1 << 18)
        totals += torch.bincount(cells, part.double(), minlength=1 << 18)
    some = counts > 0
    return (totals[some] / counts[some]).cpu().numpy(), counts[some].cpu().numpy()


def _check_bits(least: int, bits: int) -> None:
    if not least <= bits <= 8:
        raise ValueError(f"bits must be from {least} to 8, not {bits}")
