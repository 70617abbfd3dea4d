"""Codebooks: each element is sent as the index of its nearest level."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import (
    LARGEST_BLOCK,
    blocks,
    check_scale,
    exact_divide,
    largest_magnitude,
    sums,
    working_dtype,
)
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.levels import look_up, look_up_scaled, nearest, normal_levels, ordered, quantile_levels
from fedq.errors import check_range
from fedq.keys import Key

_PIECE = 1 << 20  # elements that a histogram counts at a time


class Codebook(EncodingStage):
    """The base class of codebooks with 2^bits or 2^bits − 1 levels, which follow from side values.

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

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        side = self.fit(x, key)
        return nearest(x, self.levels(side, TensorSpec.of(x))), side

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return look_up(y, self.levels(side, spec), spec)


@dataclass(frozen=True)
class LloydMax(Codebook):
    """The 2^bits levels of least squared error for a normal distribution (Lloyd 1957, Max 1960).

    The levels are scaled to the tensor's mean and standard deviation, two side values. The squared error of a normal
    tensor is 0.3634, 0.1175, 0.03454 and 0.009497 of its variance at 1, 2, 3 and 4 bits. At more bits it is about 2.72
    · 4^−bits. Biased.

    bits: 1 to 8.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8, integer=True)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Mean and standard deviation: float64 for a float64 tensor, else float32."""
        return dict.fromkeys(("mean", "deviation"), TensorSpec((), working_dtype(self, spec)))

    @override
    def levels(self, side: Tensors, spec: TensorSpec) -> Tensor:
        check_scale(side["mean"].abs(), spec)
        check_scale(side["deviation"], spec)
        limit = torch.finfo(torch.float64).max
        return normal_levels(self.bits).mul(float(side["deviation"])).add_(float(side["mean"])).clamp_(-limit, limit)

    @override
    def fit(self, x: Tensor, key: Key) -> Tensors:
        # in units of the largest magnitude: no square of a float64 overflows or underflows
        unit, n, dtype = largest_magnitude(x) or 1.0, max(x.numel(), 1), working_dtype(self, TensorSpec.of(x))
        mean = sums(x, lambda part: exact_divide(part, unit))[0] / n
        variance = sums(x, lambda part: exact_divide(part, unit).sub_(mean).square_())[0] / n
        mean, deviation = torch.tensor([unit * mean, unit * math.sqrt(variance)], dtype=dtype)
        return {"mean": mean, "deviation": deviation}


@dataclass(frozen=True)
class KMeans(Codebook):
    """2^bits levels that are fitted to the tensor and sent as a side value (Han 2016; Lloyd 1957).

    The first levels are quantiles of the density to the power of 1/3, which are best for many levels (Panter and Dite
    1951). Lloyd's iterations follow. No iteration increases the squared error. Levels are fitted to a histogram of all
    elements; a cell's width is 1/512 of its distance from the mean. Biased.

    bits: 1 to 8.
    iterations: number of Lloyd's iterations, 0 or more.
    """

    bits: int = 4
    iterations: int = 50

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8, integer=True)
        check_range("iterations", self.iterations, 0, integer=True)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The sorted levels, in the tensor's own dtype."""
        working_dtype(self, spec)
        return {"levels": TensorSpec((1 << self.bits,), spec.dtype)}

    @override
    def levels(self, side: Tensors, spec: TensorSpec) -> Tensor:
        levels = side["levels"].double()
        if not bool((levels[1:] >= levels[:-1]).all()):
            raise ValueError("the levels are not sorted")
        return levels

    @override
    def fit(self, x: Tensor, key: Key) -> Tensors:
        if x.numel() == 0:
            return {"levels": torch.zeros(1 << self.bits, dtype=x.dtype)}
        # in units of the largest magnitude and relative to the mean, like the cells of the histogram
        unit = largest_magnitude(x) or 1.0
        mean = float(np.float32(sums(x, lambda part: exact_divide(part, unit))[0] / x.numel()))
        points, counts = _histogram(x, unit, mean)
        number, totals, squares = (
            np.concatenate(([0.0], values.cumsum())) for values in (counts, points * counts, points**2 * counts)
        )
        # In a part of fixed mass and width w, the density is proportional to 1/w, and the density of levels to
        # w^(−1/3).
        edges = points[np.searchsorted(number[1:-1], np.linspace(0, number[-1], 1024))]
        levels_up_to = np.concatenate(([0.0], np.cumsum(np.diff(edges) ** (2 / 3))))
        levels = np.interp((np.arange(1 << self.bits) + 0.5) / (1 << self.bits) * levels_up_to[-1], levels_up_to, edges)
        for _ in range(self.iterations):
            ends = np.concatenate(([0], np.searchsorted(points, (levels[1:] + levels[:-1]) / 2), [len(points)]))
            own = np.diff(number[ends])
            levels, before = np.where(own > 0, np.diff(totals[ends]) / np.maximum(own, 1), levels), levels
            if (empty := np.flatnonzero(own == 0)).size:  # move them to where most of the squared error is
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

    max |x| is a side value. The error of an element is at most (base − 1) / (base + 1) of its magnitude, or half the
    smallest positive level for elements below that level. Biased.

    bits: 2 to 8.
    base: above 1.
    """

    bits: int = 4
    base: float = 2.0

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8, integer=True)
        check_range("base", self.base, above=1)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The largest magnitude, in the tensor's own dtype."""
        working_dtype(self, spec)
        return {"scale": TensorSpec((), spec.dtype)}

    @override
    def levels(self, side: Tensors, spec: TensorSpec) -> Tensor:
        check_scale(side["scale"], spec)
        positive = [float(side["scale"]) * self.base**-k for k in reversed(range((1 << self.bits - 1) - 1))]
        return torch.tensor([-level for level in reversed(positive)] + [0.0] + positive, dtype=torch.float64)

    @override
    def fit(self, x: Tensor, key: Key) -> Tensors:
        return {"scale": torch.tensor(largest_magnitude(x), dtype=x.dtype)}


@dataclass(frozen=True)
class NormalFloat(EncodingStage):
    """2^bits levels at quantiles of a normal distribution, with 0 and ±1, and a scale for each block (Dettmers 2023).

    At 4 bits the levels are NF4's. Takes a floating tensor of any shape; gives symbols of the same shape, and the
    largest magnitude of each block as a side value. Biased. An element's error is at most half the widest gap between
    levels: 0.152 of the block's largest magnitude at 4 bits.

    bits: 2 to 8.
    block: consecutive elements with one scale, 1 to 16,384.
    """

    bits: int = 4
    block: int = 64

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8, integer=True)
        check_range("block", self.block, 1, LARGEST_BLOCK, integer=True)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The largest magnitude of each block, in the tensor's own dtype."""
        working_dtype(self, spec)
        return {"scales": TensorSpec((-(-spec.numel // self.block),), spec.dtype)}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        check_scale(side["scales"], spec)
        return TensorSpec.symbols(spec.shape, 1 << self.bits)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        levels, scales = quantile_levels(self.bits), [x.new_zeros(0)]
        symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for rows, out in blocks(x, self.block, symbols):
            scale = rows.abs().amax(1, keepdim=True)
            scales.append(scale.view(-1).to(x.dtype))
            out.copy_(nearest(rows.div(scale.masked_fill(scale == 0, 1)).view(-1), levels)[: len(out)])
        return symbols, {"scales": torch.cat(scales).cpu()}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return look_up_scaled(y, quantile_levels(self.bits), side["scales"], self.block, spec)


def _histogram(x: Tensor, unit: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of x/unit − mean in each cell that is not empty, in order, and the number of its elements.

    A cell holds the float32 numbers with the same upper 18 bits: sign, exponent and 9 bits of the mantissa.
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
