"""Several symbols a byte, and runs of bytes of zeros."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.coder import Coder, checked
from fedq.encoding.schema import TensorSpec
from fedq.errors import check_range


@dataclass(frozen=True)
class ZeroRuns(Coder):
    """3LC's base-3⁵ ("quartic") and zero-run encoding (Lim 2019), for up to 243 levels.

    A byte below 243 holds as many symbols as fit, as digits, the first digit most significant: five symbols of three
    levels, 1.6 bits each. A run of 2, 3, … bytes of zeros is one byte, from levelsᵏ up to 255. With three levels the
    bytes 243 to 255 are runs of 2 to 14. Longer runs are split, the longest part first. Zeros fill up the last byte.

    zero: the most frequent symbol; None: the middle one (levels // 2), which is 0 in symmetric quantisers.
    """

    needs_levels = True

    zero: int | None = None

    def __post_init__(self) -> None:
        check_range("zero", self.zero, 0, integer=True, optional=True)

    def encode(self, symbols: Tensor, spec: TensorSpec) -> bytes:
        """Raises ValueError for a symbol out of range."""
        levels, digits, zero, base = self._layout(spec)
        values = checked(symbols, 0, levels - 1)
        groups = np.full((-(-len(values) // digits), digits), zero, np.uint8)
        groups.reshape(-1)[: len(values)] = values
        packed = groups[:, 0].copy()
        for digit in range(1, digits):
            packed *= np.uint8(levels)
            packed += groups[:, digit]
        empty = zero * (base - 1) // (levels - 1)
        places = np.flatnonzero(packed == empty)
        first = np.diff(places, prepend=-2) > 1  # symbols of a run
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=len(places))
        offsets = np.arange(len(places)) - np.repeat(starts, lengths)
        pieces = np.minimum(np.repeat(lengths, lengths) - offsets, 257 - base)
        packed[places] = np.where(pieces > 1, base - 2 + pieces, empty)
        kept = np.ones(len(packed), np.bool_)
        kept[places] = offsets % (257 - base) == 0
        return packed[kept].tobytes()

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        levels, digits, zero, base = self._layout(spec)
        groups = -(-spec.numel // digits)
        if len(data) > groups:
            raise ValueError(f"{groups} bytes before runs are expected, there are {len(data)}")
        empty = zero * (base - 1) // (levels - 1)
        packed = np.frombuffer(data, np.uint8)
        runs = packed >= base
        zeros = runs | (packed == empty)
        if bool((zeros[1:] & zeros[:-1] & (packed[:-1] < 255)).any()):
            raise ValueError("a run of zeros is split")
        counts = np.where(runs, packed.astype(np.int64) - (base - 2), 1)
        if int(counts.sum()) != groups:
            raise ValueError(f"{groups} bytes before runs are expected, there are {counts.sum()}")
        table = np.arange(base)[:, None] // levels ** np.arange(digits - 1, -1, -1) % levels
        values = table.astype(np.uint8)[np.repeat(np.where(runs, np.uint8(empty), packed), counts)].reshape(-1)
        if bool((values[spec.numel :] != zero).any()):
            raise ValueError("the last byte is not filled up with zeros")
        return torch.from_numpy(values[: spec.numel]).to(spec.dtype).reshape(spec.shape)

    def _layout(self, spec: TensorSpec) -> tuple[int, int, int, int]:
        """Returns the levels, the symbols a byte, the zero, and the number of bytes that are not runs."""
        levels = spec.levels
        if levels is None or not 2 <= levels <= 243 or (self.zero or 0) >= levels:
            raise ValueError(f"ZeroRuns packs symbols of 2 to 243 levels that include {self.zero}, not {levels} levels")
        digits = next(digits for digits in range(7, 0, -1) if levels**digits <= 243)
        return levels, digits, levels // 2 if self.zero is None else self.zero, levels**digits
