"""Elements ↔ the nearest of sorted levels, and the levels for a normal distribution."""

import math
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from fedq.encoding.numerics import CHUNK, chunks, in_rows, saturate
from fedq.encoding.schema import TensorSpec


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Returns the index of the level nearest to each element (uint8); of two equally near levels, the lower one.

    The time hardly depends on the number of levels. For the upper 16 bits of a float32, a table holds the number of
    thresholds that are surely below. The function then compares each element with few thresholds.

    x: floating, of any shape.
    levels: up to 256, sorted (float64, on the CPU).
    """
    work = torch.promote_types(x.dtype, torch.float32)
    thresholds = (levels[:-1] / 2 + levels[1:] / 2).to(x.device, work)  # halved first: the sum may overflow
    next_threshold = torch.cat((thresholds, thresholds.new_tensor([torch.inf])))
    table, most = _table(thresholds) if work == torch.float32 and x.numel() > CHUNK // 8 else (thresholds, 256)
    symbols = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for given, out in chunks(x, symbols):
        part = given.to(work).contiguous()
        if most > 12:  # direct search for float64, for few elements, or for levels that hardly differ
            index = torch.bucketize(part, thresholds, out_int32=True)
        else:
            index = table.index_select(0, part.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF))
            for _ in range(most):
                index.add_(part > next_threshold.index_select(0, index))
        out.copy_(index)
    return symbols


def look_up(y: Tensor, levels: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the tensor of `spec` for the symbols `y`; levels (float64) are clamped to the dtype's range."""
    limit = torch.finfo(spec.dtype).max
    levels = levels.clamp(-limit, limit).to(y.device, spec.dtype)
    decoded = torch.empty(spec.shape, dtype=spec.dtype, device=y.device)
    for part, out in chunks(y, decoded):
        torch.index_select(levels, 0, part.int(), out=out)
    return decoded


def look_up_scaled(y: Tensor, levels: Tensor, scales: Tensor, block: int, spec: TensorSpec) -> Tensor:
    """Returns the result of `look_up`, with each `block` of consecutive elements multiplied by its own scale."""
    work = torch.promote_types(spec.dtype, torch.float32)
    decoded = torch.empty(spec.shape, dtype=spec.dtype, device=y.device)
    flat, out, step = y.reshape(-1), decoded.view(-1), max(1, CHUNK // block) * block
    levels, scales = levels.to(y.device, work), scales.to(y.device, work)[:, None]
    for start in range(0, len(flat), step):
        rows = in_rows(levels.index_select(0, flat[start : start + step].int()), block)
        rows = saturate(rows.mul_(scales[start // block :][: len(rows)]), spec.dtype)
        out[start : start + step] = rows.view(-1)[: len(out) - start]
    return decoded


@cache
def normal_levels(bits: int) -> Tensor:
    """Returns the 2^bits levels of least squared error for the standard normal distribution (float64, sorted).

    Each level is the mean of the values between the thresholds halfway to its neighbours. Newton's method starts from
    the levels that are best for many bits.
    """
    n, normal = 1 << bits, NormalDist()
    levels = [NormalDist(0, math.sqrt(3)).inv_cdf((i + 0.5) / n) for i in range(n)]
    for _ in range(100):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        below, density = [normal.cdf(t) for t in edges], [normal.pdf(t) for t in edges]
        # the tridiagonal system (1 − ∂mean/∂level) · step = mean − level, solved by elimination
        ratio, step = [0.0] * n, [0.0] * n
        upper = 0.0
        for i in range(n):
            mass = below[i + 1] - below[i]
            mean = (density[i] - density[i + 1]) / mass
            left = density[i] * (mean - edges[i]) / mass / 2 if i else 0.0
            right = density[i + 1] * (edges[i + 1] - mean) / mass / 2 if i < n - 1 else 0.0
            pivot = 1 - left - right - left * (upper if i else 0.0)
            step[i] = (mean - levels[i] + left * (step[i - 1] if i else 0.0)) / pivot
            ratio[i] = upper = right / pivot
        for i in reversed(range(n - 1)):
            step[i] += ratio[i] * step[i + 1]
        levels = [level + change for level, change in zip(levels, step, strict=True)]
        if max(map(abs, step)) < 1e-13:
            break
    return torch.tensor([(b - a) / 2 for a, b in zip(levels, reversed(levels), strict=True)][::-1], dtype=torch.float64)


@cache
def quantile_levels(bits: int) -> Tensor:
    """Returns the levels of NormalFloat (float64, sorted), from −1 to 1. At 4 bits they are NF4's published levels."""
    n, normal = 1 << bits, NormalDist()
    top = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    # one more positive level than negative ones
    positive = [normal.inv_cdf(0.5 + (top - 0.5) * i / (n // 2)) for i in range(1, n // 2 + 1)]
    negative = [-normal.inv_cdf(0.5 + (top - 0.5) * i / (n // 2 - 1)) for i in range(n // 2 - 1, 0, -1)]
    return torch.tensor([*negative, 0.0, *positive], dtype=torch.float64) / normal.inv_cdf(top)


def _table(thresholds: Tensor) -> tuple[Tensor, int]:
    """Returns the number of thresholds surely below, for all upper 16 bits of a float32, and the most in between."""
    cells = ordered(thresholds.view(torch.int32) >> 16, 16)
    within = torch.bincount(cells, minlength=1 << 16)
    below = (within.cumsum(0) - within).int()
    upper = torch.arange(1 << 16, dtype=torch.int32, device=thresholds.device)
    return below.index_select(0, ordered((upper ^ 0x8000) - 0x8000, 16)), int(within.max())


def ordered(upper: Tensor, bits: int) -> Tensor:
    """Maps the upper bits of float32 numbers (as integers) to 0 … 2^bits − 1 in the order of the numbers."""
    half = 1 << bits - 1
    return (upper ^ ((upper >> 31) & (half - 1))) + half
