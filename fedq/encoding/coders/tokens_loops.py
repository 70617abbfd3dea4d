"""The loops of tokens (see tokens.py): integers only."""

import numpy as np

from fedq.encoding.compiled import compiled

DIRECT = 1 << 10
"""Integers below this limit have their own token. Above, a token stands for an eighth of a power of two."""


@compiled
def count_tokens(tokens, size):
    """Counts tokens (all below `size`) in four tables: with one table, the processor would wait at repeated tokens."""
    counts = np.zeros((4, size), np.int64)
    whole = len(tokens) // 4 * 4
    for i in range(0, whole, 4):
        counts[0, tokens[i]] += 1
        counts[1, tokens[i + 1]] += 1
        counts[2, tokens[i + 2]] += 1
        counts[3, tokens[i + 3]] += 1
    for i in range(whole, len(tokens)):
        counts[0, tokens[i]] += 1
    return counts.sum(0)


@compiled
def bit_length(value):
    """Returns the number of bits of a value of 0 or more."""
    length = 0
    while value:
        value >>= 1
        length += 1
    return length


@compiled
def _write(out, at, held, pending, value, width):
    """Appends `width` bits to the `held` < 8 pending ones, least significant first, and stores whole bytes."""
    pending |= value << held
    held += width
    while held >= 8:
        out[at] = pending & 0xFF
        at, held, pending = at + 1, held - 8, pending >> 8
    return at, held, pending


@compiled
def _read(data, bit, width):
    """Returns `width` ≤ 56 bits from number `bit` on; 8 bytes must follow from its byte on."""
    value = 0
    for i in range((bit % 8 + width + 7) // 8):
        value |= np.int64(data[bit // 8 + i]) << (8 * i)
    return (value >> (bit % 8)) & ((1 << width) - 1)


@compiled
def split(values, centre, tokens, out):
    """Splits integers into tokens (see tokens.py) and packed low bits; returns the number of bytes of low bits."""
    at, held, pending = 0, 0, 0
    for i in range(len(values)):
        value = np.int64(values[i]) - centre
        size, token = abs(value), abs(value)
        if size >= DIRECT:
            octave = bit_length(size >> 11)
            width = octave + 7
            token = DIRECT + 8 * octave + ((size >> width) & 7)
            at, held, pending = _write(out, at, held, pending, size & ((1 << width) - 1), width)
        tokens[i] = DIRECT + 175 + (token if value > 0 else -token)
    if held:
        out[at] = pending
        at += 1
    return at


@compiled
def join(tokens, centre, data, lowest, highest, out):
    """Inverts `split`; returns the number of bytes read from `data`, whose last 8 are padding.

    Returns −1 if bytes are missing, if an integer is not from `lowest` to `highest`, or if bits are left over.
    """
    bit, end = 0, 8 * (len(data) - 8)
    for i in range(len(tokens)):
        value = np.int64(tokens[i]) - (DIRECT + 175)
        token = abs(value)
        if token >= DIRECT:
            width = (token - DIRECT) // 8 + 7
            if bit + width > end:
                return -1
            size = ((8 | (token & 7)) << width) | _read(data, bit, width)
            bit += width
            value = size if value > 0 else -size
        value += centre
        if not lowest <= value <= highest:
            return -1
        out[i] = value
    if bit % 8 and data[bit // 8] >> (bit % 8):
        return -1
    return (bit + 7) // 8


@compiled
def _write_golomb(out, at, held, pending, value, order):
    """Writes a value of 0 or more: the length of value + 2^order in unary, then its bits below the leading one."""
    value += 1 << order
    width = bit_length(value) - 1
    at, held, pending = _write(out, at, held, pending, 1 << (width - order), width - order + 1)
    return _write(out, at, held, pending, value & ((1 << width) - 1), width)


@compiled
def _read_golomb(data, bit, end, order):
    """Returns a value below 2²⁰ (−1 for an invalid one), and the place of the bit after it."""
    width = order
    while bit < end and width < 20 and not (data[bit // 8] >> (bit % 8)) & 1:
        width, bit = width + 1, bit + 1
    if width == 20 or bit + 1 + width > end:
        return -1, bit
    return _read(data, bit + 1, width) + (1 << width) - (1 << order), bit + 1 + width


@compiled
def golomb_encode(values, order, out):
    """Writes values in the exponential Golomb code of `order`. After each 0 follows the number of further zeros.

    Returns the number of bytes written, at most 5 for each value and 5 more.
    """
    at, held, pending, i = 0, 0, 0, 0
    while i < len(values):
        value, i = values[i], i + 1
        at, held, pending = _write_golomb(out, at, held, pending, value, order)
        if value == 0:
            start = i
            while i < len(values) and values[i] == 0:
                i += 1
            at, held, pending = _write_golomb(out, at, held, pending, i - start, 0)
    if held:
        out[at] = pending
        at += 1
    return at


@compiled
def golomb_decode(data, order, out):
    """Inverts `golomb_encode` for len(out) values. Returns the bytes read, or −1 for invalid bytes.

    The last 8 bytes of `data` are padding.
    """
    bit, end, i = 0, 8 * (len(data) - 8), 0
    while i < len(out):
        value, bit = _read_golomb(data, bit, end, order)
        if value < 0:
            return -1
        out[i] = value
        i += 1
        if value == 0:
            more, bit = _read_golomb(data, bit, end, 0)
            if not 0 <= more <= len(out) - i:
                return -1
            out[i : i + more] = 0
            i += more
    if bit % 8 and data[bit // 8] >> (bit % 8):
        return -1
    return (bit + 7) // 8
