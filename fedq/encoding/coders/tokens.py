"""Symbols ↔ tokens of a small alphabet, and tables of numbers ↔ few bytes, for the entropy coders."""

import struct

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.coders.coder import checked, limits
from fedq.encoding.schema import TensorSpec

MOST = 4096
"""The most levels for which each symbol is a token."""

WINDOW = struct.Struct("<HH")
"""The first token that occurs, and the distance to the last one."""

_SPLIT = 2 * 1199 + 1  # the tokens of 32-bit integers
_CENTRE = struct.Struct("<i")


def alphabet(spec: TensorSpec) -> int:
    """Returns the number of tokens for symbols of `spec`.

    Up to 4,096 levels, each symbol is a token. Other integers (32 bits, signed) are relative to a centre. Each integer
    up to 1,023 below or above it has its own token. Larger integers share tokens: each token stands for an eighth of a
    power of two, and the lower bits are sent uncoded. This costs little if the distribution is smooth over an eighth.
    """
    return _direct(spec) or _SPLIT


def edges(spec: TensorSpec) -> np.ndarray:
    """Returns the limits between the integers of neighbouring tokens, and both outer limits (float64).

    If there is a centre, the limits are relative to it.
    """
    if direct := _direct(spec):
        return np.arange(direct + 1) - 0.5
    octaves = np.ldexp(np.arange(8.0, 16.0), np.arange(7, 29)[:, None]).reshape(-1)  # from 2¹⁰ to 15/8 · 2³¹
    upper = np.concatenate((np.arange(1.0, 1025.0), octaves[1:], [2.0**32])) - 0.5
    return np.concatenate((-upper[::-1], upper))


def tokenise(symbols: Tensor, spec: TensorSpec) -> tuple[bytes, np.ndarray, bytes]:
    """Returns the centre, the tokens (a vector of uint8 up to 256 tokens, else uint16) and the low bits.

    symbols: at least one element. Raises ValueError for a symbol out of range.
    """
    from fedq.encoding.coders.tokens_loops import split

    values = checked(symbols, *limits(spec))
    if direct := _direct(spec):
        return b"", values.astype(np.uint8 if direct <= 256 else np.uint16, copy=False), b""
    sample = np.sort(values[:: len(values) // MOST + 1])
    centre = int(sample[len(sample) // 2])
    tokens, low = np.empty(len(values), np.uint16), np.empty(4 * len(values) + 1, np.uint8)
    used = split(values.astype(np.int32, copy=False), centre, tokens, low)
    return _CENTRE.pack(centre), tokens, low[:used].tobytes()


def take_centre(data: memoryview, spec: TensorSpec) -> tuple[int, memoryview]:
    """Reads the centre, if there is one: returns the centre and the rest of `data`."""
    if _direct(spec):
        return 0, data
    (centre,), data = take(_CENTRE, data)
    return centre, data


def take(format_: struct.Struct, data: memoryview) -> tuple[tuple[int, ...], memoryview]:
    """Reads a struct: returns its values and the rest of `data`. Raises ValueError if bytes are missing."""
    if len(data) < format_.size:
        raise ValueError(f"{format_.size} bytes are expected, {len(data)} are left")
    return format_.unpack_from(data), data[format_.size :]


def histogram(tokens: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Returns how often each token of the alphabet occurs."""
    from fedq.encoding.coders.tokens_loops import count_tokens

    size = alphabet(spec)
    counts: np.ndarray = count_tokens(tokens, max(256, size))
    return counts[:size]


def window(counts: np.ndarray) -> tuple[int, int]:
    """Returns the first and the last token that occur."""
    used = np.flatnonzero(counts)
    return int(used[0]), int(used[-1])


def take_window(data: memoryview, spec: TensorSpec) -> tuple[int, int, memoryview]:
    """Reads the first and the last token that occur: returns both and the rest of `data`."""
    (first, more), data = take(WINDOW, data)
    if first + more >= alphabet(spec):
        raise ValueError(f"there are no tokens {first} to {first + more}")
    return first, first + more, data


def empty(spec: TensorSpec) -> np.ndarray:
    """Returns an empty array for the tokens of a tensor of `spec`."""
    return np.empty(spec.numel, np.uint8 if alphabet(spec) <= 256 else np.uint16)


def detokenise(centre: int, tokens: np.ndarray, low: memoryview, spec: TensorSpec) -> Tensor:
    """Inverts `tokenise`. Raises ValueError if the low bits do not fit the tokens."""
    from fedq.encoding.coders.tokens_loops import join

    values, used = tokens, 0
    if not _direct(spec):
        values = np.empty(len(tokens), np.int32)
        used = join(tokens, centre, padded(low), *limits(spec), values)
    if used != len(low):
        raise ValueError("the low bits do not fit the tokens")
    if values.dtype == np.uint16:
        values = values.astype(np.int32)  # torch has few operations for uint16
    return torch.from_numpy(values).to(spec.dtype).reshape(spec.shape)


def padded(data: memoryview) -> np.ndarray:
    """Returns the bytes and 8 zeros: a loop may read up to 8 bytes beyond the end."""
    values = np.zeros(len(data) + 8, np.uint8)
    values[: len(data)] = data
    return values


def pack_numbers(numbers: np.ndarray) -> bytes:
    """Returns integers from 0 to 2¹⁷ in few bytes: the Golomb code of the integers or of their differences.

    The first byte holds the choice, and the order of the code.
    """
    from fedq.encoding.coders.tokens_loops import golomb_encode

    steps = np.diff(numbers, prepend=0)
    codes, out = [], np.empty(5 * len(numbers) + 6, np.uint8)
    for delta, values in ((0, numbers), (16, np.where(steps < 0, -2 * steps - 1, 2 * steps))):
        for order in range(16):
            out[0] = delta + order
            used = golomb_encode(values, order, out[1:])
            codes.append(out[: 1 + used].tobytes())
    return min(codes, key=len)


def take_numbers(data: memoryview, count: int) -> tuple[np.ndarray, memoryview]:
    """Inverts `pack_numbers`: returns the numbers (int64, any values) and the rest of `data`."""
    from fedq.encoding.coders.tokens_loops import golomb_decode

    if not len(data) or data[0] >= 32:
        raise ValueError("a table is missing")
    values = np.empty(count, np.int64)
    used = golomb_decode(padded(data[1 : 6 * count + 7]), data[0] % 16, values)
    if used < 0:
        raise ValueError("a table is damaged")
    if data[0] >= 16:
        values = np.cumsum(np.where(values % 2, -(values + 1) // 2, values // 2))
    return values, data[1 + used :]


def normalise(counts: np.ndarray, bits: int) -> np.ndarray:
    """Returns frequencies (int64) in proportion to `counts`, at least 1 each, with the sum 2^bits.

    All arithmetic is in integers, so the result is the same on every machine. `counts` are 0 or more, fewer than
    2^bits, not all 0, and their sum is below 2⁴⁷.
    """
    low, room, mass = np.zeros(len(counts), bool), 1 << bits, int(counts.sum())
    while bool((few := ~low & (counts * room < mass)).any()):
        low |= few
        room, mass = (1 << bits) - int(low.sum()), int(counts[~low].sum())
    shares = np.where(low, mass, counts * room)
    frequencies = shares // mass
    left = (1 << bits) - int(frequencies.sum())
    frequencies[np.argsort(-(shares % mass), kind="stable")[:left]] += 1
    return frequencies


def _direct(spec: TensorSpec) -> int | None:
    """Returns the number of levels if each symbol is a token, else None."""
    lowest, highest = limits(spec)
    return highest + 1 if lowest == 0 and highest < MOST else None
