"""Asymmetric numeral systems.

Four states of 32 bits take turns (Giesen 2014) and move 16 bits at a time through one stream. A multiplication by an
exact reciprocal replaces the division, and no step branches on a symbol. Columns: million symbols a second to encode
and to decode, and bytes above the empirical entropy, with tables. The symbols are 1,605,632 symbols of 8 bits from a
rounded normal law, in one run and one thread of a shared core. A copy of as many float32 took 0.28 ms.

    σ = 25, 6.69 bits a symbol          encode  decode
    ANS()                                  150     320  +0.07 %
    ANS("normal")                          127     264  +0.09 %
    ANS("laplace")                         168     271  +1.07 %: another law
    ANS("student")                          98     269  +0.19 %
    ANS("adaptive")                        122     133  +0.12 %
    Huffman()                              306     415  +0.66 %
    Zstandard(1)                           538     469  +0.84 %
    constriction 0.5, the law given        160      34  +0.00 %
    zlib, Huffman only                      72     228  +0.52 %

Format, little-endian:
- the window: the first token that occurs (uint16), and the distance to the last one (uint16);
- the table, or the model's parameters;
- the centre if symbols are split (int32, see tokens.py);
- four states (uint32) and words (uint16);
- the low bits of split symbols.
A tensor without elements has no bytes.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders import models, tokens
from fedq.encoding.coders.coder import Buffer, Coder
from fedq.encoding.schema import TensorSpec
from fedq.errors import check_choice

_BITS = struct.Struct("B")
_STATES = struct.Struct("<4I")
_LOW = 1 << 16  # the least state; decoding must end in it
_CHOICES = (10, 12, 14, 16)  # bits of the sum of a table's frequencies
_BLOCK = 1 << 16

Model = Literal["empirical", "normal", "laplace", "student", "adaptive"]
Blocks = Iterable[tuple[np.ndarray, np.ndarray]]
"""Pairs: tokens, and the frequencies of the whole alphabet that code them."""


@dataclass(frozen=True)
class ANS(Coder):
    """Range asymmetric numeral systems (Duda 2013): nearly as short as the entropy, for any integers of 32 bits.

    Takes symbols with or without levels, in any integer dtype. Up to 4,096 levels, each symbol is a token.

    model: the source of the frequencies.
        "empirical": a table in the message, about 30 to 250 bytes for 256 symbols. The table has the precision that
        gives the fewest bytes. Within 1 % of the empirical entropy on a million symbols. The worst case is hundreds of
        symbols that are each rarer than 1 in 65,536. "normal", "laplace", "student": the law of this family that fits
        best, in 7 bytes (see models.py). Symbols that differ from the law take more than their entropy. Every
        symbol can be coded. "adaptive": the symbols already coded, block by block; blocks double up to 65,536 symbols.
        No table is sent. Learning costs about 5 bits for each symbol that occurs, and again when the law changes. The
        coder follows slow changes.
    """

    model: Model = "empirical"

    def __post_init__(self) -> None:
        check_choice("model", self.model, Model)

    @override
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        if not spec.numel:
            return b""
        centre, values, low = tokens.tokenise(symbols, spec)
        counts = tokens.histogram(values, spec)
        first, last = tokens.window(counts)
        table, bits, window = b"", models.BITS, counts[first : last + 1]
        if self.model == "adaptive":
            blocks = _adapt(values, first, last, spec)
        else:
            if self.model == "empirical":
                table, frequencies, bits = _make_table(window)
            else:
                table, frequencies = models.fit(self.model, window, tokens.edges(spec)[first : last + 2])
            blocks = [(values, _placed(frequencies, first, spec))]
        return b"".join((tokens.WINDOW.pack(first, last - first), table, centre, *_push(blocks, bits), low))

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        values, centre = tokens.empty(spec), 0
        if len(values):
            first, last, data = tokens.take_window(data, spec)
            bits = models.BITS
            if self.model == "adaptive":
                blocks = _adapt(values, first, last, spec)
            else:
                if self.model == "empirical":
                    frequencies, bits, data = _take_table(data, last - first + 1)
                else:
                    frequencies, data = models.take(self.model, data, tokens.edges(spec)[first : last + 2])
                blocks = [(values, _placed(frequencies, first, spec))]
            centre, data = tokens.take_centre(data, spec)
            data = _pop(data, blocks, bits)
        return tokens.detokenise(centre, values, data, spec)

    @override
    def model_size(self, data: memoryview) -> int:
        if not len(data):
            return 0
        (_, more), rest = tokens.take(tokens.WINDOW, data)
        if self.model == "empirical":
            rest = _take_table(rest, more + 1)[-1]
        elif self.model != "adaptive":
            rest = rest[models.SIZE :]
        return len(data) - len(rest)


def _push(blocks: Blocks, bits: int) -> tuple[Buffer, Buffer]:
    """Returns the stream of blocks of tokens, in two parts; the frequencies of each block sum to 2^bits."""
    from fedq.encoding.coders.ans_loops import rans_encode

    blocks = list(blocks)
    out = np.empty(sum(len(values) for values, _ in blocks) + 1, np.uint16)  # each token writes at most one word
    at, states = len(out), np.full(4, _LOW, np.uint64)
    for values, frequencies in reversed(blocks):
        dividend, divisor = np.uint64(1 << (bits + 32)), np.maximum(frequencies, 1).astype(np.uint64)
        reciprocals = (dividend + divisor - np.uint64(1)) // divisor
        at = rans_encode(values, _entries(frequencies), reciprocals, bits, out, at, states)
    return _STATES.pack(*states.tolist()), out[at:].astype("<u2", copy=False).data


def _pop(data: memoryview, blocks: Blocks, bits: int) -> memoryview:
    """Inverts `_push`: fills the blocks, returns the rest of `data`.

    Raises ValueError for bytes that `_push` never writes.
    """
    from fedq.encoding.coders.ans_loops import rans_decode

    start, data = tokens.take(_STATES, data)
    states, at = np.array(start, np.uint64), 0
    words = np.zeros(len(data) // 2 + 4, np.uint16)  # the last four are padding
    words[:-4] = np.frombuffer(data, "<u2", len(data) // 2)
    for values, frequencies in blocks:
        slots = np.repeat(np.arange(len(frequencies), dtype=values.dtype), frequencies)
        at = rans_decode(words, at, _entries(frequencies), slots, bits, values, states)
        if at < 0:
            raise ValueError("the stream ends before its last symbol")
    if (states != _LOW).any():
        raise ValueError("the stream does not end in its first state")
    return data[2 * at :]


def _entries(frequencies: np.ndarray) -> np.ndarray:
    """Returns, for each token, frequency · 2³² + the sum of the frequencies before."""
    entries: np.ndarray = (frequencies << 32 | np.cumsum(frequencies) - frequencies).astype(np.uint64)
    return entries


def _placed(window: np.ndarray, first: int, spec: TensorSpec) -> np.ndarray:
    """Returns an array over the whole alphabet: `window` from token `first` on, and 0 elsewhere."""
    values = np.zeros(tokens.alphabet(spec), np.int64)
    values[first : first + len(window)] = window
    return values


def _adapt(values: np.ndarray, first: int, last: int, spec: TensorSpec) -> Blocks:
    """Yields growing blocks of `values`, each with the frequencies of the tokens in the blocks before.

    A decoder fills each block before it asks for the next. Every token counts as half an occurrence at the start. After
    each block of full size counts are halved, so that the model follows a change.
    """
    weights, start, length = np.ones(last - first + 1, np.int64), 0, 256
    while start < len(values):
        block = values[start : start + length]
        yield block, _placed(tokens.normalise(weights, models.BITS), first, spec)
        weights += 2 * tokens.histogram(block, spec)[first : last + 1]
        start += length
        if length < _BLOCK:
            length *= 2
        else:
            weights -= weights // 2


def _make_table(counts: np.ndarray) -> tuple[bytes, np.ndarray, int]:
    """Returns the table with the shortest sum of table and payload: its bytes, its frequencies, and its bits.

    A table of more bits is more exact, but longer and slower, so it must save 1 byte in 1,000.
    """
    used = np.flatnonzero(counts)
    choices: list[tuple[float, bytes, np.ndarray, int]] = []
    for bits in reversed(_CHOICES):
        if len(used) > 1 << bits:
            break
        frequencies = np.zeros(len(counts), np.int64)
        frequencies[used] = tokens.normalise(counts[used], bits)
        table = bytes([bits]) + tokens.pack_numbers(frequencies)
        size = len(table) + float((counts[used] * (bits - np.log2(frequencies[used]))).sum()) / 8
        choices.append((size, table, frequencies, bits))
    limit = 1.001 * min(size for size, *_ in choices)
    return [choice[1:] for choice in choices if choice[0] <= limit][-1]


def _take_table(data: memoryview, count: int) -> tuple[np.ndarray, int, memoryview]:
    """Inverts `_make_table`: returns the frequencies, their bits and the rest of `data`."""
    (bits,), data = tokens.take(_BITS, data)
    numbers, data = tokens.take_numbers(data, count)
    if bits not in _CHOICES or int(numbers.min()) < 0 or int(numbers.sum()) != 1 << bits:
        raise ValueError(f"frequencies that sum to {int(numbers.sum())} are not of {bits} bits")
    return numbers, bits, data
