"""Sparsification: only some elements are sent."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders import Coder, SparseMask
from fedq.encoding.numerics import exact_divide, largest_magnitude, saturate, sums, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.errors import check_range
from fedq.keys import Key


@dataclass(frozen=True)
class RandomMask(EncodingStage):
    """Keeps elements that the key chooses, so that their places cost no bytes (Konečný 2016, §3).

    Takes a floating tensor of any shape. Gives the kept elements in order, in the same dtype, of shape (k,). k is
    fraction · n, rounded, and at least 1. The n elements fall into k cells of neighbours, whose sizes differ by at most
    one. One element of each cell is kept; all others are decoded as 0.

    fraction: above 0, at most 1.
    shared: True: all clients of a round keep the same elements, and their sum is decoded once. The error of the mean is
        the error of one client. A broadcast with a mask at the same place of its chain keeps the same elements. Uploads
        then depend on the places, and their mean is biased.
    scale: True multiplies a kept element by the size s of its cell, up to the dtype's largest value. This is unbiased.
        The squared error is Σ (s − 1)·x², about (n/k − 1)·‖x‖², as for every unbiased random mask. False: kept elements
        are decoded unchanged.
    """

    fraction: float = 0.1
    shared: bool = False
    scale: bool = True

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, above=0, high=1)

    @property
    def unbiased(self) -> bool:
        """True with `scale`."""
        return self.scale

    @property
    def commutes_with_sum(self) -> bool:
        """True with `shared`."""
        return self.shared

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The kept elements."""
        working_dtype(self, spec)
        return TensorSpec((_kept(self.fraction, spec.numel),), spec.dtype)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        places, _ = self._cells(x.numel(), key)
        return x.reshape(-1)[places.to(x.device)], {}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        places, sizes = self._cells(spec.numel, key)
        if self.scale:
            y = saturate(y.to(working_dtype(self, spec)) * sizes.to(y.device), spec.dtype)
        return _scattered(places, y, spec)

    def _cells(self, n: int, key: Key) -> tuple[Tensor, Tensor]:
        """Returns for each cell the place of its kept element, and its size."""
        k = _kept(self.fraction, n)
        size, larger = divmod(n, max(k, 1))  # `larger` cells have one element more
        sizes = np.full(k, size)
        sizes[:larger] += 1
        draws = (key.shared() if self.shared else key).bits(k, 32).astype(np.int64)
        draws *= sizes
        draws >>= 32
        draws[1:] += np.cumsum(sizes[:-1])
        return torch.from_numpy(draws), torch.from_numpy(sizes)


class _Masked(EncodingStage):
    """The base class of stages that send the kept elements (in order, same dtype) and a mask."""

    side_coders: ClassVar[Mapping[str, Coder]] = {"mask": SparseMask()}

    @abstractmethod
    def _mask(self, x: Tensor) -> np.ndarray:
        """Returns the mask of a vector: True for elements to keep."""

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The mask: 1 for kept elements."""
        working_dtype(self, spec)
        return {"mask": TensorSpec.symbols((spec.numel,), 2)}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The kept elements: one for each 1 in the mask."""
        return TensorSpec((int(np.count_nonzero(side["mask"].numpy())),), spec.dtype)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        flat = x.reshape(-1)
        mask = self._mask(flat)
        places = torch.from_numpy(np.flatnonzero(mask))
        return flat[places.to(x.device)], {"mask": torch.from_numpy(mask.view(np.uint8))}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        return _scattered(torch.from_numpy(np.flatnonzero(side["mask"].numpy().view(np.bool_))), y, spec)


@dataclass(frozen=True)
class TopK(_Masked):
    """Keeps the elements of largest magnitude (Aji and Heafield 2017; Lin 2018); the others are decoded as 0.

    Takes a floating tensor of any shape. Gives the kept elements in order, in the same dtype, of shape (k,). k is
    fraction · n, rounded, and at least 1. The side value is a mask. Among equal magnitudes, the first in order are
    kept. The squared error is the sum of the other elements' squares, the least possible with k elements. Biased: use
    the stage with error feedback.

    fraction: above 0, at most 1.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, above=0, high=1)

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """The kept elements."""
        kept, k = super().encoded_spec(spec, side), _kept(self.fraction, spec.numel)
        if kept.numel != k:
            raise ValueError(f"the mask keeps {kept.numel} elements, not {k}")
        return kept

    def _mask(self, x: Tensor) -> np.ndarray:
        n, k = x.numel(), _kept(self.fraction, x.numel())
        magnitudes = x.to(working_dtype(self, TensorSpec.of(x))).abs().cpu().numpy()
        # non-negative floats are in the order of their bits, and integers are faster to sort
        ranks = magnitudes.view(np.int32 if magnitudes.itemsize == 4 else np.int64)
        if k == n:
            return np.ones(n, np.bool_)
        least = np.partition(ranks, n - k)[n - k]
        mask: np.ndarray = ranks > least
        mask[np.flatnonzero(ranks == least)[: k - int(np.count_nonzero(mask))]] = True
        return mask


@dataclass(frozen=True)
class Threshold(_Masked):
    """Keeps the elements of a magnitude above a threshold (after Strom 2015); the others are decoded as 0.

    Takes a floating tensor of any shape. Gives the kept elements in order, in the same dtype, of shape (k,) with k from
    0 to n. The side value is a mask. No error is above the threshold. Biased: use the stage with error feedback.

    threshold: 0 or more.
    relative: Whether the threshold is in units of the tensor's root mean square.
    """

    threshold: float = 1.0
    relative: bool = True

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0)

    def _mask(self, x: Tensor) -> np.ndarray:
        threshold, unit = self.threshold, largest_magnitude(x)
        if self.relative and unit:
            (total,) = sums(x, lambda part: exact_divide(part, unit).square_())  # in units of the largest: no overflow
            threshold *= unit * math.sqrt(total / x.numel())
        magnitudes = x.to(working_dtype(self, TensorSpec.of(x))).abs().cpu().numpy()
        mask: np.ndarray = magnitudes > min(threshold, float(np.finfo(magnitudes.dtype).max))
        return mask


def _kept(fraction: float, n: int) -> int:
    return min(n, max(1, round(fraction * n)))


def _scattered(places: Tensor, values: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the tensor of `spec` with `values` at `places` and 0 elsewhere."""
    flat = torch.zeros(spec.numel, dtype=values.dtype, device=values.device)
    return flat.scatter_(0, places.to(values.device), values).reshape(spec.shape)
