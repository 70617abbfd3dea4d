"""Huffman codes.

Codes have at most 12 bits (15 for alphabets of more than 256), so that one look into a table of 2¹² entries decodes
a symbol; four streams, a quarter of the symbols each, are read side by side. Measured as in ans.py: 306 M symbols/s to
encode and 415 to decode, 0.66 % above an entropy of 6.69 bits (zlib's Huffman-only strategy: 72 and 228, 0.52 %, and
none of its codes can be agreed on before, as LearnedHuffman's).

Format, little-endian: the window and the centre as in ans.py, between them the lengths of the codes (0 for none, else
length + 1); the sizes of the four streams (uint32); the streams, most significant bit first; the low bits.
"""

import struct
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedq.encoding.coders import tokens as shared
from fedq.encoding.coders.coder import Buffer, Coder
from fedq.encoding.schema import TensorSpec

_SIZES = struct.Struct("<4I")  # bytes of the streams
_PADDING = 16


@dataclass(frozen=True)
class Huffman(Coder):
    """Canonical Huffman codes (Huffman 1952) of the symbols' own frequencies; the codes' lengths travel.

    Takes the symbols that ANS takes. No code has less than 1 bit, unless there is one symbol only: the rate is at most
    p + 0.086 bits above the entropy, p being the most frequent symbol's share (Gallager 1978), usually 0.03;
    below 2 bits a symbol ANS is the one to take.
    """

    def encode(self, symbols: Tensor, spec: TensorSpec) -> Buffer:
        """As Coder.encode."""
        if not spec.numel:
            return b""
        centre, tokens, low = shared.tokenise(symbols, spec)
        counts = shared.histogram(tokens, spec)
        first, last = shared.window(counts)
        lengths = np.zeros(len(counts), np.int64)
        lengths[counts > 0] = code_lengths(counts[counts > 0], longest(len(counts))) + 1
        table = shared.pack_numbers(lengths[first : last + 1])
        return b"".join((shared.WINDOW.pack(first, last - first), table, centre, write(tokens, lengths), low))

    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        """As Coder.decode."""
        tokens, centre = shared.empty(spec), 0
        if len(tokens):
            first, last, data = shared.take_window(data, spec)
            lengths = np.zeros(shared.alphabet(spec), np.int64)
            lengths[first : last + 1], data = shared.take_numbers(data, last - first + 1)
            centre, data = shared.take_centre(data, spec)
            data = read(data, lengths, longest(len(lengths)), tokens)
        return shared.detokenise(centre, tokens, data, spec)

    def model_size(self, data: memoryview) -> int:
        """As Coder.model_size."""
        if not len(data):
            return 0
        (_, more), rest = shared.take(shared.WINDOW, data)
        return len(data) - len(shared.take_numbers(rest, more + 1)[1])


def longest(alphabet: int) -> int:
    """Returns the length that no code may exceed: the table of all that may come next has to stay in the cache.

    alphabet: how many tokens there are.
    """
    return 12 if alphabet <= 256 else 15


def code_lengths(weights: np.ndarray, limit: int) -> np.ndarray:
    """Returns the lengths of the best prefix code of which none exceeds `limit`, by package-merge (Larmore 1990).

    Only integers, so that both sides find the same. One symbol alone has length 0.
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


def write(tokens: np.ndarray, lengths: np.ndarray) -> bytes:
    """Returns four streams, a quarter of the tokens each, behind their sizes. `lengths` are 1 more than the codes'."""
    codes = np.zeros(len(lengths), np.uint32)
    symbols, codes_in_order, _, _ = _canonical(lengths)
    codes[symbols] = codes_in_order
    width = np.maximum(lengths - 1, 0).astype(np.uint8)
    quarter, streams = len(tokens) // 4, []
    for i in range(4):
        part = tokens[i * quarter : (i + 1) * quarter if i < 3 else None]
        words = np.empty(len(part) // 2 + 1, np.uint32)
        bits = shared.kernels().huffman_encode(part, codes, width, words)
        streams.append(words[: -(-bits // 32)].astype(">u4").view(np.uint8)[: -(-bits // 8)].data)
    return b"".join((_SIZES.pack(*map(len, streams)), *streams))


def read(data: memoryview, lengths: np.ndarray, limit: int, tokens: np.ndarray) -> memoryview:
    """Inverts `write`: fills `tokens` and returns the rest of `data`. Raises ValueError for what it never makes."""
    if not (int(lengths.min()) >= 0 and 1 <= int(lengths.max()) <= limit + 1):
        raise ValueError(f"codes have 0 to {limit} bits, not {int(lengths.max()) - 1}")
    symbols, _, spans, width = _canonical(lengths)
    if int(spans.sum()) != 1 << width:
        raise ValueError("the codes' lengths are those of no code")
    sizes, data = shared.take(_SIZES, data)
    if sum(sizes) > len(data):
        raise ValueError("a stream is cut")
    # each stream begins at a word and has padding behind it
    begins = np.cumsum([0] + [size // 4 * 4 + _PADDING for size in sizes[:3]])
    padded, rest = np.zeros(int(begins[3]) + sizes[3] // 4 * 4 + _PADDING, np.uint8), data
    for begin, size in zip(begins.tolist(), sizes, strict=True):
        padded[begin : begin + size], rest = rest[:size], rest[size:]
    words, bits, ends = padded.view(">u4").astype(np.uint32), 8 * begins, 8 * (begins + sizes)
    if width == 0:
        tokens.fill(symbols[0])
    else:
        table = np.repeat(16 * symbols + lengths[symbols] - 1, spans).astype(np.uint16)
        if not shared.kernels().huffman_decode(words, bits, ends, table, width, tokens):
            raise ValueError("a stream ends before its last symbol")
    for bit, end in zip(bits.tolist(), ends.tolist(), strict=True):
        if not 0 <= end - bit < 8 or padded[(end - 1) // 8] & ((1 << (end - bit)) - 1):
            raise ValueError("a stream does not end with its last symbol")
    return rest


def _canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Returns the symbols in the order of their codes, the codes, what share of 2^width each has, and the width.

    The order is by length and then by number; so the lengths tell all (Schwartz 1964). `lengths` are 1 more than the
    codes', 0 for symbols that have none.
    """
    symbols = np.flatnonzero(lengths)
    symbols = symbols[np.argsort(lengths[symbols], kind="stable")]
    width = int(lengths.max()) - 1
    spans = 1 << (width + 1 - lengths[symbols])
    return symbols, (np.cumsum(spans) - spans) // spans, spans, width
