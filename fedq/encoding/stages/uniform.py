"""Uniform quantisation: a fixed number of bits for each element."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import in_rows, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.random_numbers import random_integers
from fedq.errors import check_choice, check_range
from fedq.keys import Key

Rounding = Literal["stochastic", "nearest", "dithered"]

_CHUNK = 1 << 19  # elements of a piece: smaller pieces need more calls, larger pieces do not fit the cache


@dataclass(frozen=True)
class UniformQuantization(EncodingStage):
    """Quantises to evenly spaced values, one `step` apart, from the lower to the upper end of a range (Suresh 2017).

    Takes a floating tensor of any shape. Gives symbols of the same shape (uint8 up to 8 bits, else int32). Side values
    are the range: float64 for a float64 tensor, else float32. By default the range is from the minimum to the maximum
    of the elements, with 2^bits values. With `quantile` or `limit` the range is −t to t, with 2^bits − 1 values, of
    which one is 0. A range costs 64 bits, or 32 with `quantile`, for each channel or block.

    bits: 1 to 16; with quantile or limit 2 to 16.
    rounding: "stochastic" rounds up with the fraction as probability (Konečný 2016, §3; Suresh 2017, §2.2). It is
        unbiased, with the squared error step²/6 at high rate. "nearest" is biased, with step²/12 at high rate.
        "dithered" adds a uniform number in (−½, ½) steps before rounding. The receiver draws the same number from the
        key, and subtracts it (Roberts 1962; Schuchman 1964). This is unbiased. The error is uniform and independent of
        the value, step²/12 at any rate. The sum stays within half a step of the range, so that nothing is clipped.
        Random numbers have 16 bits, so means are exact to 2^−17 steps, and with 9 to 12 bits to 2^−24 of the range.
    quantile: the share of elements within −t to t, rounded up. All others are clipped, which is biased. Above 0, at
        most 1; 1 clips no element. If this quantile of the magnitudes is 0, t is the largest magnitude.
    limit: t, above 0. Both sides know t, so there are no side values. Elements beyond are clipped, which is biased.
    axis: each channel along this axis has its own range; negative numbers count from the last axis. A tensor of fewer
        than two axes has one range.
    block: each block of consecutive elements, in row-major order, has its own range; the last may be shorter.
    """

    bits: int = 8
    rounding: Rounding = "stochastic"
    quantile: float | None = None
    limit: float | None = None
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 16, integer=True)
        check_choice("rounding", self.rounding, Rounding)
        check_range("quantile", self.quantile, above=0, high=1, optional=True)
        check_range("limit", self.limit, above=0, optional=True)
        check_range("axis", self.axis, integer=True, optional=True)
        check_range("block", self.block, 1, integer=True, optional=True)
        if self._symmetric and self.bits < 2:
            raise ValueError("bits must be 2 or more for a range with 0 in its middle, not 1")
        if sum(value is not None for value in (self.axis, self.block, self.limit)) > 1:
            raise ValueError("at most one of axis, block and limit must be given")
        if self.quantile is not None and self.limit is not None:
            raise ValueError("at most one of quantile and limit must be given")

    @property
    def unbiased(self) -> bool:
        """True if nothing is clipped, unless rounding is "nearest"."""
        return self.rounding != "nearest" and self.limit is None and self.quantile in (None, 1)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The maximum of each range, and the minimum unless ranges are symmetric."""
        shape: tuple[int, ...] = ()
        if self.axis is not None and (axes := len(spec.shape)) > 1:
            if not -axes <= self.axis < axes:
                raise ValueError(f"there is no axis {self.axis} in a tensor of {axes} axes")
            shape = (spec.shape[self.axis],)
        elif self.block is not None:
            shape = (-(-spec.numel // self.block),)
        bound = TensorSpec(shape, working_dtype(self, spec))
        if self._symmetric:
            return {} if self.limit is not None else {"maximum": bound}
        return {"minimum": bound, "maximum": bound}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        return TensorSpec.symbols(spec.shape, self._top + 1)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        spec, rows = TensorSpec.of(x), self._rows(x)
        side = self._range(rows, spec)
        low, step, _ = self._grid(side, spec, x.device)
        step = step.where(step > 0, 1)  # if all elements are equal
        symbols = torch.empty(rows.shape, dtype=TensorSpec.symbols((), self._top + 1).dtype, device=x.device)
        random, integer = key.bit_generator(), torch.int32 if step.dtype == torch.float32 else torch.int64
        for part, out, scaled, spare, a, width in _chunks(rows, symbols, low, step):
            torch.sub(part, a, out=scaled).div_(width)
            if self.rounding == "nearest":
                scaled.add_(0.5 + self._origin)
            else:
                spare.copy_(random_integers(random, spare, torch.int16))
                scaled.add_(spare, alpha=2**-16).add_(0.5 + 2**-17 + self._origin)
            # a cast through int32 is several times faster
            out.copy_(spare.view(integer).copy_(scaled.clamp_(0, self._top)))
        return self._tensor(symbols, spec), side

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        low, step, high = self._grid(side, spec, y.device)
        rows, largest = self._rows(y), torch.finfo(spec.dtype).max
        random = key.bit_generator() if self.rounding == "dithered" else None
        decoded = torch.empty(rows.shape, dtype=spec.dtype, device=y.device)
        columns = (low, step) if high is None else (low, step, high)
        for part, out, scratch, spare, a, width, *b in _chunks(rows, decoded, *columns):
            # in place if the working dtype is the tensor's
            value = (out if out.dtype == step.dtype else scratch).copy_(part)
            if random is not None:
                spare.copy_(random_integers(random, spare, torch.int16))
                value.sub_(spare, alpha=2**-16).sub_(2**-17)
            if self._symmetric:
                value.sub_(self._origin).mul_(width)
            else:
                value.mul_(width).add_(a)
            if self._symmetric or random is not None:
                value.clamp_(-largest, largest)
            elif b:
                torch.minimum(value, *b, out=value)
            if value is not out:
                out.copy_(value)
        return self._tensor(decoded, spec)

    @cached_property
    def _symmetric(self) -> bool:
        return self.quantile is not None or self.limit is not None

    @cached_property
    def _top(self) -> int:
        """The largest symbol."""
        return (1 << self.bits) - (2 if self._symmetric else 1)

    @cached_property
    def _origin(self) -> int:
        """The symbol of the value 0 in a symmetric range, else the symbol of the minimum."""
        return self._top // 2 if self._symmetric else 0

    def _rows(self, x: Tensor) -> Tensor:
        """Returns the elements as rows, one for each range. Zeros fill up the last block."""
        if self.axis is not None and x.dim() > 1:
            return x.movedim(self.axis, 0).flatten(1)
        flat = x.reshape(-1)
        block = min(self.block or len(flat), len(flat))
        return in_rows(flat, block) if block else flat.view(1, 0)

    def _tensor(self, rows: Tensor, spec: TensorSpec) -> Tensor:
        """Inverts `_rows`."""
        if self.axis is None or len(spec.shape) < 2:
            return rows.view(-1)[: spec.numel].view(spec.shape)
        shape = list(spec.shape)
        shape.insert(0, shape.pop(self.axis))
        return rows.view(shape).movedim(0, self.axis).contiguous()

    def _range(self, rows: Tensor, spec: TensorSpec) -> Tensors:
        """Returns the side values."""
        side_spec = self.side_spec(spec)
        if not side_spec or not rows.numel():
            return {name: torch.zeros(own.shape, dtype=own.dtype) for name, own in side_spec.items()}
        padding = rows.numel() - spec.numel  # the last block has a range without the zeros
        ends: dict[str, list[Tensor]] = {"minimum": [], "maximum": []}
        for part in (rows[:-1], rows[-1:, :-padding]) if padding else (rows,):
            low, high = part.amin(1), part.amax(1)
            if self.quantile is not None:
                high = torch.maximum(high, -low)
            if self.quantile is not None and self.quantile < 1:
                magnitudes = part.abs().to("cpu", torch.promote_types(part.dtype, torch.float32)).numpy()
                place = math.ceil(self.quantile * part.shape[1]) - 1
                magnitudes.partition(place, axis=1)
                clipped = torch.from_numpy(magnitudes[:, place]).to(high)
                high = torch.where(clipped > 0, clipped, high)
            ends["minimum"].append(low)
            ends["maximum"].append(high)
        return {name: torch.cat(ends[name]).to("cpu", own.dtype).reshape(own.shape) for name, own in side_spec.items()}

    def _grid(self, side: Tensors, spec: TensorSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns for each row (rows × 1) the value of the symbol `_origin`, the step, and the maximum.

        The dtype is float32 if its range and precision suffice, else float64. The maximum is None unless rounding may
        move the last symbol's value beyond the maximum. Raises ValueError for side values that are no range.
        """
        # for few numbers numpy's calls take a fifth of torch's time
        high = np.float64(self.limit) if self.limit is not None else side["maximum"].numpy().astype(np.float64)
        low = np.zeros_like(high) if self._symmetric else side["minimum"].numpy().astype(np.float64)
        low, high = low.reshape(-1, 1), high.reshape(-1, 1)
        steps, fits = self._top - self._origin, self.bits <= 12 and spec.dtype != torch.float64
        with np.errstate(over="ignore"):  # a range may overflow its dtype
            extent = high - low
            if not (np.isfinite(extent) & (extent >= 0)).all():
                raise ValueError("minimum and maximum are not a finite range")
            fits = fits and bool(((extent == 0) | (extent > 1e-30) & (extent < 1e30)).all())
            work: type[np.floating] = np.float32 if fits else np.float64
            low, high, step = low.astype(work), high.astype(work), (extent / steps).astype(work)
            step = np.where(step * steps + low > high, np.nextafter(step, work(0)), step)  # undo rounding up
            exceeds = bool((step * steps + low > high).any())
        last = torch.from_numpy(high).to(device) if exceeds else None
        return torch.from_numpy(low).to(device), torch.from_numpy(step).to(device), last


def _chunks(rows: Tensor, out: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields pieces of two tensors, two scratch tensors of the columns' dtype, and the same rows of columns.

    The scratch tensors use the same memory for every piece: new memory costs a page fault for every 4 KiB.
    """
    if len(rows) == 1:
        rows, out = rows.t(), out.t()
    # a multiple of four elements uses complete words of the random stream
    step = max(4, _CHUNK // max(1, rows.shape[1]) // 4 * 4)
    scratch = torch.empty((2, *rows[:step].shape), dtype=columns[0].dtype, device=rows.device)
    pieces = (torch.split(tensor.expand(len(rows), -1), step) for tensor in (rows, out, *columns))
    for part, of_out, *of_columns in zip(*pieces, strict=True):
        yield part, of_out, *scratch[:, : len(part)], *of_columns
