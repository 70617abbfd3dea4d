"""What stages that send a scale share: the dtype to work in, sums, and scales of blocks."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedq.encoding.schema import TensorSpec

CHUNK = 1 << 17  # elements worked on at a time: the working set stays in the cache
_ROW = 1 << 10
LARGEST_BLOCK = 1 << 14
"""torch adds up rows no longer than this in one thread, so that sums are the same on every number of threads."""


def working_dtype(who: object, spec: TensorSpec) -> torch.dtype:
    """Returns float64 for a float64 tensor, else float32. Raises ValueError for integers and float8."""
    if not spec.dtype.is_floating_point or spec.dtype.itemsize == 1:
        raise ValueError(f"{type(who).__name__} takes floating tensors of 16 to 64 bits, not {spec.dtype}")
    return torch.float64 if spec.dtype == torch.float64 else torch.float32


def largest_magnitude(x: Tensor) -> float:
    """Returns max |x|; 0 of an empty tensor."""
    return max(map(abs, map(float, torch.aminmax(x)))) if x.numel() else 0.0


def exact_divide(x: Tensor, by: float) -> Tensor:
    """Returns x / by, of `x` float32 or float64, with the same bits on every device.

    CUDA multiplies by a number's reciprocal, which is off in the last bit, and infinite for a denormal: not a tensor's.
    """
    return x / torch.tensor(by, dtype=x.dtype, device=x.device)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `x` in `dtype`: what is beyond its limits becomes the largest it holds. May write to `x`."""
    limit = torch.finfo(dtype).max
    return x.clamp_(-limit, limit).to(dtype)


def sums(x: Tensor, *terms: Callable[[Tensor], Tensor]) -> list[float]:
    """Returns the sum over all elements of each of `terms`, which take float64 and write nothing.

    Squares of a float32 neither overflow nor underflow here; those of a float64 may.
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
    """Yields the elements of `x`, and with them those of `out` (contiguous) to be written, CHUNK at a time."""
    return zip(torch.split(x.reshape(-1), CHUNK), torch.split(out.view(-1), CHUNK), strict=True)


def blocks(x: Tensor, block: int) -> Iterator[Tensor]:
    """Yields the elements of `x` in rows of `block`, some rows at a time, float32 or float64.

    The last row is filled up with zeros. The tensors may share the memory of `x`.
    """
    flat, step = x.reshape(-1), max(1, CHUNK // (4 * block)) * 4 * block
    for start in range(0, len(flat), step):
        yield in_rows(flat[start : start + step].to(torch.promote_types(x.dtype, torch.float32)), block)


def in_rows(flat: Tensor, block: int) -> Tensor:
    """Returns `flat` in rows of `block`, the last filled up with zeros; it may share its memory."""
    return (torch.nn.functional.pad(flat, (0, -len(flat) % block)) if len(flat) % block else flat).view(-1, block)


def check_block(name: str, block: int) -> None:
    """Raises ValueError where `block` is not a length that `blocks` takes."""
    if not 1 <= block <= LARGEST_BLOCK:
        raise ValueError(f"{name} must be from 1 to {LARGEST_BLOCK}, not {block}")


def check_scale(scale: Tensor, spec: TensorSpec) -> None:
    """Raises ValueError where a side value is not a magnitude, or magnitudes, that the dtype of `spec` holds."""
    if scale.numel() and not 0 <= float(scale.min()) <= float(scale.max()) <= torch.finfo(spec.dtype).max:
        raise ValueError(f"a scale is not from 0 to the largest {spec.dtype}")
