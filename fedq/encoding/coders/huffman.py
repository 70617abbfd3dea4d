"""Huffman codes.

Codes have at most 12 bits (15 for alphabets of more than 256): one look into a table of 2¹² entries decodes a symbol.
Four streams, of a quarter of the symbols each, are read side by side. In the measurement of ans.py, encoding takes 306
million symbols a second, and decoding 415. The bytes are 0.66 % above an entropy of 6.69 bits. zlib's Huffman-only
strategy has 72, 228 and 0.52 %.

Format, little-endian:
- the window, as in ans.py;
- the lengths of the codes (0 for none, else length + 1);
- the centre, as in ans.py;
- the sizes of the four streams (uint32), and the streams, most significant bit first;
- the low bits of split symbols.
"""

import struct
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders import tokens
from fedq.encoding.coders.coder import Buffer, Coder
from fedq.encoding.schema import TensorSpec

_SIZES = struct.Struct("<4I")  # bytes of the streams
_PADDING = 16


@dataclass(frozen=True)
class Huffman(Coder):
    """Canonical Huffman codes (Huffman 1952) of the symbols' own frequencies; the lengths of the codes are sent.

    Takes the same symbols as ANS. The rate is usually 0.03 bits above the entropy. It is at most p + 0.086 bits above,
    where p is the most frequent symbol's share (Gallager 1978). A code has at least 1 bit, unless only one symbol
    occurs. Below 2 bits a symbol, ANS is shorter.
    """

    @override
    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        if not spec.numel:
            return b""
        centre, values, low = tokens.tokenise(symbols, spec)
        counts = tokens.histogram(values, spec)
        first, last = tokens.window(counts)
        lengths = np.zeros(len(counts), np.int64)
        lengths[counts > 0] = code_lengths(counts[counts > 0], longest(len(counts))) + 1
        table = tokens.pack_numbers(lengths[first : last + 1])
        return b"".join((tokens.WINDOW.pack(first, last - first), table, centre, write(values, lengths), low))

    @override
    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        values, centre = tokens.empty(spec), 0
        if len(values):
            first, last, data = tokens.take_window(data, spec)
            lengths = np.zeros(tokens.alphabet(spec), np.int64)
            lengths[first : last + 1], data = tokens.take_numbers(data, last - first + 1)
            centre, data = tokens.take_centre(data, spec)
            data = read(data, lengths, longest(len(lengths)), values)
        return tokens.detokenise(centre, values, data, spec)

    @override
    def model_size(self, data: memoryview) -> int:
        if not len(data):
            return 0
        (_, more), rest = tokens.take(tokens.WINDOW, data)
        return len(data) - len(tokens.take_numbers(rest, more + 1)[1])


def longest(alphabet: int) -> int:
    """Returns the largest length of a code for a number of tokens. The decoder's table must fit into the cache."""
    return 12 if alphabet <= 256 else 15


def code_lengths(weights: np.ndarray, limit: int) -> np.ndarray:
    """Returns the lengths of the best prefix code with lengths up to `limit`, by package-merge (Larmore 1990).

    All arithmetic is in integers: every machine finds the same code. A single symbol has length 0.
    """
    order = np.argsort(weights, kind="stable")
    leaves = weights[order]
    packages, rounds = leaves[:0], []
    for _ in range(limit):
        items = np.concatenate((leaves, packages))
        rank = np.argsort(items, kind="stable")
        rounds.append(rank < len(leaves))
        pairs = items[rank[: len(items) // 2 * 2]]
        packages = pairs[::2] + pairs[1::2]
    lengths, taken = np.zeros(len(weights), np.int64), 2 * len(weights) - 2
    for is_leaf in reversed(rounds):
        few = int(is_leaf[:taken].sum())
        lengths[order[:few]] += 1
        taken = 2 * (taken - few)
    return lengths


def write(values: np.ndarray, lengths: np.ndarray) -> bytes:
    """Returns the sizes of four streams and the streams, a quarter of the tokens each. `lengths` are increased by 1."""
    from fedq.encoding.coders.huffman_loops import huffman_encode

    codes = np.zeros(len(lengths), np.uint32)
    symbols, codes_in_order, _, _ = _canonical(lengths)
    codes[symbols] = codes_in_order
    width = np.maximum(lengths - 1, 0).astype(np.uint8)
    quarter, streams = len(values) // 4, []
    for i in range(4):
        part = values[i * quarter : (i + 1) * quarter if i < 3 else None]
        words = np.empty(len(part) // 2 + 1, np.uint32)
        bits = huffman_encode(part, codes, width, words)
        streams.append(words[: -(-bits // 32)].astype(">u4").view(np.uint8)[: -(-bits // 8)].data)
    return b"".join((_SIZES.pack(*map(len, streams)), *streams))


def read(data: memoryview, lengths: np.ndarray, limit: int, values: np.ndarray) -> memoryview:
    """Inverts `write`: fills `values`, returns the rest of `data`.

    Raises ValueError for bytes that `write` never writes.
    """
    from fedq.encoding.coders.huffman_loops import huffman_decode

    if not (int(lengths.min()) >= 0 and 1 <= int(lengths.max()) <= limit + 1):
        raise ValueError(f"codes have 0 to {limit} bits, not {int(lengths.max()) - 1}")
    symbols, _, spans, width = _canonical(lengths)
    if int(spans.sum()) != 1 << width:
        raise ValueError("the lengths are not those of a prefix code")
    sizes, data = tokens.take(_SIZES, data)
    if sum(sizes) > len(data):
        raise ValueError("a stream is cut")
    # each stream begins at a word, and padding follows it
    begins = np.cumsum([0] + [size // 4 * 4 + _PADDING for size in sizes[:3]])
    padded, rest = np.zeros(int(begins[3]) + sizes[3] // 4 * 4 + _PADDING, np.uint8), data
    for begin, size in zip(begins.tolist(), sizes, strict=True):
        padded[begin : begin + size], rest = rest[:size], rest[size:]
    words, bits, ends = padded.view(">u4").astype(np.uint32), 8 * begins, 8 * (begins + sizes)
    if width == 0:
        values.fill(symbols[0])
    else:
        table = np.repeat(16 * symbols + lengths[symbols] - 1, spans).astype(np.uint16)
        if not huffman_decode(words, bits, ends, table, width, values):
            raise ValueError("a stream ends before its last symbol")
    for bit, end in zip(bits.tolist(), ends.tolist(), strict=True):
        if not 0 <= end - bit < 8 or padded[(end - 1) // 8] & ((1 << (end - bit)) - 1):
            raise ValueError("a stream does not end with its last symbol")
    return rest


def _canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Returns the tokens in the order of their codes, the codes, their parts of 2^width, and the width.

    Codes are in the order of their lengths, then of their tokens, so the lengths define the codes (Schwartz 1964).
    `lengths` are increased by 1; 0 is for tokens without a code.
    """
    symbols = np.flatnonzero(lengths)
    symbols = symbols[np.argsort(lengths[symbols], kind="stable")]
    width = int(lengths.max()) - 1
    spans = 1 << (width + 1 - lengths[symbols])
    return symbols, (np.cumsum(spans) - spans) // spans, spans, width
