"""Numerics of stages: working dtypes, exact division, saturation, sums, and blocks of elements."""

import cmath
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedq.encoding.schema import TensorSpec

CHUNK = 1 << 17  # elements at a time, which stay in the cache
_ROW = 1 << 10
LARGEST_BLOCK = 1 << 14
"""torch sums rows up to this length in one thread: sums are then the same on any number of threads."""


def working_dtype(who: object, spec: TensorSpec) -> torch.dtype:
    """Returns float64 for a float64 tensor, else float32. Raises ValueError for integers and float8."""
    if not spec.dtype.is_floating_point or spec.dtype.itemsize == 1:
        raise ValueError(f"{type(who).__name__} takes floating tensors of 16 to 64 bits, not {spec.dtype}")
    return torch.float64 if spec.dtype == torch.float64 else torch.float32


def largest_magnitude(x: Tensor) -> float:
    """Returns max |x|, or 0 for an empty tensor."""
    return max(map(abs, map(float, torch.aminmax(x)))) if x.numel() else 0.0


def exact_divide(x: Tensor, by: float) -> Tensor:
    """Returns x / by (float32 or float64), with the same bits on every device.

    For a Python number CUDA multiplies by the reciprocal, which differs in the last bit and is infinite for a denormal.
    For a tensor it divides.
    """
    return x / torch.tensor(by, dtype=x.dtype, device=x.device)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `x` in `dtype`, clamped to its range. May write to `x`."""
    limit = torch.finfo(dtype).max
    return x.clamp_(-limit, limit).to(dtype)


def sums(x: Tensor, *terms: Callable[[Tensor], Tensor]) -> list[float]:
    """Returns, for each of `terms`, the sum of its values over all elements.

    A term takes a float64 vector and does not write to it. Squares of float32 elements never overflow or underflow;
    squares of float64 elements may.
    """
    flat, totals = x.reshape(-1), [0.0] * len(terms)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK].double()
        whole = len(part) // _ROW * _ROW
        for i, term in enumerate(terms):
            values = term(part)
            totals[i] += float(values[:whole].view(-1, _ROW).sum(1).cpu().numpy().sum()) + float(values[whole:].sum())
    return totals


def chunks(x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields views of `x` and `out` (contiguous), CHUNK elements at a time."""
    return zip(torch.split(x.reshape(-1), CHUNK), torch.split(out.view(-1), CHUNK), strict=True)


def blocks(x: Tensor, block: int, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields some elements of `x` at a time, in rows of `block` and in float32 or float64, and their part of `out`.

    Zeros fill the last row up. The rows may share the memory of `x`; the parts are vectors of `out` (contiguous).
    """
    work, step = torch.promote_types(x.dtype, torch.float32), max(1, CHUNK // (4 * block)) * 4 * block
    for part, own in zip(torch.split(x.reshape(-1), step), torch.split(out.view(-1), step), strict=True):
        if len(part):
            yield in_rows(part.to(work), block), own


def in_rows(flat: Tensor, block: int) -> Tensor:
    """Returns `flat` in rows of `block`; zeros fill the last row up. The rows may share the memory of `flat`."""
    return (torch.nn.functional.pad(flat, (0, -len(flat) % block)) if len(flat) % block else flat).view(-1, block)


def check_scale(scale: Tensor, spec: TensorSpec) -> None:
    """Raises ValueError unless all scales, a side value, are from 0 to the largest number of `spec`'s dtype."""
    if scale.numel() and not 0 <= float(scale.min()) <= float(scale.max()) <= torch.finfo(spec.dtype).max:
        raise ValueError(f"a scale is not from 0 to the largest {spec.dtype}")


def is_finite(tensor: Tensor) -> bool:
    """Returns whether `tensor` holds neither NaN nor infinity. Integers never do."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return True
    if tensor.dtype.itemsize == 1:  # torch cannot add up float8
        tensor = tensor.float()
    # One NaN or infinity makes the sum NaN or infinite, in a fifth of the time. The reverse may be an overflow.
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def finite(tensor: Tensor) -> Tensor:
    """Returns `tensor`. Raises ValueError if it holds NaN or infinity."""
    if not is_finite(tensor):
        raise ValueError("a value is NaN or infinite")
    return tensor
