"""Uniform quantisation: a fixed number of bits for each element."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.numerics import in_rows, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.keys import Key

_ENCODED, _DECODED = 1 << 18, 1 << 20  # elements worked on at a time: the working set stays in the cache


@dataclass(frozen=True)
class UniformQuantization(EncodingStage):
    """Quantises to evenly spaced values, `step` apart, from the lower to the upper end of a range, both included.

    Takes a floating tensor of any shape; gives symbols of the same shape (uint8 up to 8 bits, else int32) and the
    range as side values, in float64 for a float64 tensor, else float32.

    rounding: "stochastic" rounds up with a probability equal to the fraction (Konečný 2016, §3; Suresh 2017, §2.2):
        unbiased, squared error step²/6 at high rate. "nearest": step²/12 at high rate, biased. "dithered" adds a
        number that is uniform in (−½, ½) steps before it rounds, and the receiver, who draws the same from the key,
        subtracts it (Roberts 1962; Schuchman 1964): unbiased, the error is uniform and independent of the value,
        step²/12 at any rate. The sum never leaves the half step around the range's ends, so that nothing overloads.
        Random numbers have 16 bits: means are right to 2^−17 steps, no nearer; and with 9 to 12 bits, where a float32
        holds both, to 2^−24 of the range.

    The range is one of
    - minimum to maximum of the elements: 2^bits values;
    - −t to t where t is the `quantile` of the magnitudes: that share of the elements, rounded up, is not clipped. 1 is
      the symmetric range, which clips none. Where the quantile is 0 but not all elements are, t is the largest;
    - −t to t where t is `limit`, agreed beforehand: no side values; what is beyond is clipped.
    From −t to t there are 2^bits − 1 values, and 0 is one of them. Clipping is biased.

    There is a range for the whole tensor, for each channel along `axis`, or for each `block` of consecutive elements
    in row-major order, the last one shorter. That costs 64 bits, with `quantile` 32, for each channel or block. A
    tensor of fewer than two axes has no channels, and one range.

    bits: 1 to 16; from 2 for −t to t. quantile: above 0, up to 1. limit: above 0. axis: negative counts from the last.
    """

    bits: int = 8
    rounding: Literal["stochastic", "nearest", "dithered"] = "stochastic"
    quantile: float | None = None
    limit: float | None = None
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits must be from 1 to 16, not {self.bits}")
        if self.rounding not in ("stochastic", "nearest", "dithered"):
            raise ValueError(f"rounding must be stochastic, nearest or dithered, not {self.rounding!r}")
        if self.quantile is not None and not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must be above 0 and at most 1, not {self.quantile}")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be above 0 and finite, not {self.limit}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be 1 element or more, not {self.block}")
        if self._symmetric and self.bits < 2:
            raise ValueError("bits must be from 2 for a range with 0 in its middle, not 1")
        if sum(value is not None for value in (self.axis, self.block, self.limit)) > 1:
            raise ValueError("at most one of axis, block and limit must be given")
        if self.quantile is not None and self.limit is not None:
            raise ValueError("at most one of quantile and limit must be given")

    @property
    def unbiased(self) -> bool:
        """True where nothing is clipped, unless it is rounded to nearest."""
        return self.rounding != "nearest" and self.limit is None and self.quantile in (None, 1)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The range's maximum, and its minimum where that is not −maximum: one for the tensor, or for each group."""
        shape: tuple[int, ...] = ()
        if self._has_channels(spec):
            shape = (spec.shape[self.axis or 0],)
        elif self.block is not None:
            shape = (-(-spec.numel // self.block),)
        bound = TensorSpec(shape, working_dtype(self, spec))
        if self._symmetric:
            return {} if self.limit is not None else {"maximum": bound}
        return {"minimum": bound, "maximum": bound}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Symbols of the same shape."""
        if self.limit is None:
            extent = side["maximum"].double() - (0 if self._symmetric else side["minimum"].double())
            if not bool(((extent >= 0) & (extent < math.inf)).all()):
                raise ValueError("minimum and maximum are not a finite range")
        return TensorSpec.symbols(spec.shape, self._top + 1)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        spec, rows = TensorSpec.of(x), self._rows(x)
        side = self._range(rows, spec)
        low, step, _ = self._grid(side, spec, x.device)
        step = step.where(step > 0, 1)  # where all elements are the same
        symbols = torch.empty(rows.shape, dtype=self.encoded_spec(spec, side).dtype, device=x.device)
        random = key.bit_generator()
        for part, out, a, width in _chunks(_ENCODED, rows, symbols, low, step):
            scaled = part.to(step.dtype).sub(a).div_(width)
            if self.rounding == "nearest":
                scaled.add_(0.5 + self._origin)
            else:
                scaled.add_(noise(random, part), alpha=2**-16).add_(0.5 + 2**-17 + self._origin)
            # cast by way of int32, which is several times faster than at once
            out.copy_(scaled.clamp_(0, self._top).int())
        return self._tensor(symbols, spec), side

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        low, step, high = self._grid(side, spec, y.device)
        rows, largest = self._rows(y), torch.finfo(spec.dtype).max
        random = key.bit_generator() if self.rounding == "dithered" else None
        decoded = torch.empty(rows.shape, dtype=spec.dtype, device=y.device)
        for part, out, a, width, *b in _chunks(_DECODED, rows, decoded, low, step, *([] if high is None else [high])):
            # in place where the dtype to work in is the one to give
            value = out.copy_(part) if out.dtype == step.dtype else part.to(step.dtype)
            if random is not None:
                value.sub_(noise(random, part), alpha=2**-16).sub_(2**-17)
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

    @property
    def _symmetric(self) -> bool:
        return self.quantile is not None or self.limit is not None

    @property
    def _top(self) -> int:
        """The largest symbol."""
        return (1 << self.bits) - (2 if self._symmetric else 1)

    @property
    def _origin(self) -> int:
        """The symbol of 0 in a symmetric range, else of the minimum."""
        return self._top // 2 if self._symmetric else 0

    def _has_channels(self, spec: TensorSpec) -> bool:
        axes = len(spec.shape)
        if self.axis is None or axes < 2:
            return False
        if not -axes <= self.axis < axes:
            raise ValueError(f"there is no axis {self.axis} in a tensor of {axes} axes")
        return True

    def _rows(self, x: Tensor) -> Tensor:
        """Returns the elements with one row for each range; the last block is filled up with zeros."""
        if self._has_channels(TensorSpec.of(x)):
            return x.movedim(self.axis or 0, 0).flatten(1)
        flat = x.reshape(-1)
        block = min(self.block or len(flat), len(flat))
        return in_rows(flat, block) if block else flat.view(1, 0)

    def _tensor(self, rows: Tensor, spec: TensorSpec) -> Tensor:
        """The inverse of `_rows`."""
        if not self._has_channels(spec):
            return rows.view(-1)[: spec.numel].view(spec.shape)
        shape = list(spec.shape)
        shape.insert(0, shape.pop(self.axis or 0))
        return rows.view(shape).movedim(0, self.axis or 0).contiguous()

    def _range(self, rows: Tensor, spec: TensorSpec) -> Tensors:
        """Returns the side values."""
        side_spec = self.side_spec(spec)
        if not side_spec or not rows.numel():
            return {name: torch.zeros(own.shape, dtype=own.dtype) for name, own in side_spec.items()}
        # the last block as long as it really is
        padding = rows.numel() - spec.numel
        ends = [self._ends(part) for part in ([rows[:-1], rows[-1:, :-padding]] if padding else [rows])]
        side = dict(zip(("minimum", "maximum"), map(torch.cat, zip(*ends, strict=True)), strict=True))
        return {name: side[name].to("cpu", own.dtype).reshape(own.shape) for name, own in side_spec.items()}

    def _ends(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lower and the upper end of each row's range (shape (rows,))."""
        low, high = rows.amin(1), rows.amax(1)
        if self.quantile is None:
            return low, high
        high = torch.maximum(high, -low)
        if self.quantile < 1:
            magnitudes = rows.abs().to("cpu", torch.promote_types(rows.dtype, torch.float32)).numpy()
            place = math.ceil(self.quantile * rows.shape[1]) - 1
            magnitudes.partition(place, axis=1)
            clipped = torch.from_numpy(magnitudes[:, place]).to(high)
            high = torch.where(clipped > 0, clipped, high)
        return -high, high

    def _grid(self, side: Tensors, spec: TensorSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the value of the symbol `_origin` and the step of each row (rows × 1), in the dtype to work in.

        That is float32 where its range and precision suffice. Then, the maximum of each row, if the last symbol's
        value may round to beyond it.
        """
        end = side["maximum"] if self.limit is None else torch.tensor(self.limit, dtype=torch.float64)
        start = torch.zeros_like(end) if self._symmetric else side["minimum"]
        # numpy's, whose calls cost a fifth of torch's: these are few numbers
        low, high = (v.double().numpy().reshape(-1, 1) for v in (start, end))
        steps, fits = self._top - self._origin, self.bits <= 12 and spec.dtype != torch.float64
        with np.errstate(over="ignore"):  # what is beyond float32 does not fit
            extent = high - low
            fits = fits and bool(((extent == 0) | (extent > 1e-30) & (extent < 1e30)).all())
            work: type[np.floating] = np.float32 if fits else np.float64
            low, high, step = low.astype(work), high.astype(work), (extent / steps).astype(work)
            step = np.where(step * steps + low > high, np.nextafter(step, work(0)), step)  # it was rounded up
            exceeds = bool((step * steps + low > high).any())
        first, width, last = (torch.from_numpy(v).to(device) for v in (low, step, high))
        return first, width, last if exceeds else None


def _chunks(size: int, rows: Tensor, out: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts two tensors, and what there is for each of their rows, into pieces of about `size` elements."""
    if len(rows) == 1:
        rows, out = rows.t(), out.t()
    # in fours of elements, for which a piece of the random stream is whole
    step = max(4, size // max(1, rows.shape[1]) // 4 * 4)
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        yield rows[here], out[here], *(column if len(column) == 1 else column[here] for column in columns)


def noise(random: np.random.SFC64, like: Tensor) -> Tensor:
    """Draws 16 random bits for each element: int16 r, so that (r + ½) / 2¹⁶ is evenly spread in (−½, ½)."""
    draws = random.random_raw(-(-like.numel() // 4)).view(np.int16)[: like.numel()]
    return torch.from_numpy(draws).to(like.device).reshape(like.shape)
