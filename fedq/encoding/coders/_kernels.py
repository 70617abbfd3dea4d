"""The inner loops of the entropy coders, compiled by numba on first use; only integers.

numba does not check bounds: whatever comes from the wire is checked in here before it is used as an index.
"""

import numpy as np
from numba import njit

compiled = njit(cache=True, nogil=True)
"""What all kernels are compiled with. The cache does not see a change of what is called from another file: after one of
`bit_length` or `class_of` delete the *.nbi files of their callers."""

U64 = np.uint64
LOW = 1 << 16
"""The least state of rANS: states are 32 bits wide, and 16 of them move at a time."""

DIRECT = 1 << 10
"""Integers below this have a token of their own; beyond, one for each eighth of a power of two."""


@compiled
def histogram(tokens, size):
    """Counts tokens (all below `size`) in four tables, as one would wait for itself where a token is repeated."""
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


# ------------------------------------------------------------------------------------------------------ rANS


@compiled
def _push(x, token, table, reciprocals, bits, out, at):
    entry = table[token]
    frequency = entry >> U64(32)
    over = x >= frequency << (U64(32) - bits)  # written without a branch, which would be guessed wrong
    out[at - 1] = np.uint16(x & U64(0xFFFF))
    at -= over
    x >>= U64(over) << U64(4)
    quotient = (x * reciprocals[token]) >> (bits + U64(32))
    return x + (entry & U64(0xFFFFFFFF)) + quotient * ((U64(1) << bits) - frequency), at


@compiled
def rans_encode(tokens, table, reciprocals, bits, out, at, states):
    """Codes tokens from the last to the first, writing 16-bit words downwards from `at`; returns where it ends.

    Token i goes to state i mod 4, those of an incomplete last group to state 0. `table` holds frequency · 2³² +
    start, `reciprocals` ⌈2^(bits + 32) / frequency⌉: exact for all x < frequency · 2^(32 − bits), in 64 bits.
    """
    whole, bits = len(tokens) // 4 * 4, U64(bits)
    a, b, c, d = states[0], states[1], states[2], states[3]
    for i in range(len(tokens) - 1, whole - 1, -1):
        a, at = _push(a, tokens[i], table, reciprocals, bits, out, at)
    for i in range(whole - 4, -1, -4):
        d, at = _push(d, tokens[i + 3], table, reciprocals, bits, out, at)
        c, at = _push(c, tokens[i + 2], table, reciprocals, bits, out, at)
        b, at = _push(b, tokens[i + 1], table, reciprocals, bits, out, at)
        a, at = _push(a, tokens[i], table, reciprocals, bits, out, at)
    states[0], states[1], states[2], states[3] = a, b, c, d
    return at


@compiled
def _pop(x, table, slots, bits, words, at):
    slot = x & ((U64(1) << bits) - U64(1))
    token = slots[slot]
    entry = table[token]
    x = (entry >> U64(32)) * (x >> bits) + slot - (entry & U64(0xFFFFFFFF))
    longer, under = (x << U64(16)) | U64(words[at]), x < U64(LOW)  # both ways computed: again without a branch
    return longer if under else x, at + under, token


@compiled
def rans_decode(words, at, table, slots, bits, out, states):
    """Reads len(out) tokens; returns where it ends, or −1 where words run out. The last four words are padding."""
    whole, bits, end = len(out) // 4 * 4, U64(bits), len(words) - 4
    a, b, c, d = states[0], states[1], states[2], states[3]
    for i in range(0, whole, 4):
        if at > end:
            return -1
        a, at, out[i] = _pop(a, table, slots, bits, words, at)
        b, at, out[i + 1] = _pop(b, table, slots, bits, words, at)
        c, at, out[i + 2] = _pop(c, table, slots, bits, words, at)
        d, at, out[i + 3] = _pop(d, table, slots, bits, words, at)
    for i in range(whole, len(out)):
        if at > end:
            return -1
        a, at, out[i] = _pop(a, table, slots, bits, words, at)
    states[0], states[1], states[2], states[3] = a, b, c, d
    return at if at <= end else -1


# --------------------------------------------------------------------------------------------------- Huffman


@compiled
def huffman_encode(tokens, codes, lengths, out):
    """Writes the codes, most significant bit first, into words (uint32, at least len(tokens) / 2 + 1); returns bits."""
    at, held, pending = 0, U64(0), U64(0)
    for i in range(len(tokens)):
        length = U64(lengths[tokens[i]])
        pending = (pending << length) | U64(codes[tokens[i]])
        held += length
        full = held >= U64(32)  # without a branch: a word that is not full yet is written over by the next
        out[at] = (pending >> (held - U64(32) if full else U64(0))) & U64(0xFFFFFFFF)
        at += full
        held -= U64(full) << U64(5)
    out[at] = (pending << (U64(32) - held)) & U64(0xFFFFFFFF)
    return 32 * at + np.int64(held)


@compiled
def _window(words, bit):
    """Returns 64 bits, of which the first 33 at least are those from number `bit` on."""
    return ((U64(words[bit >> 5]) << U64(32)) | U64(words[(bit >> 5) + 1])) << U64(bit & 31)


@compiled
def huffman_decode(words, bits, ends, table, width, out):
    """Reads four streams side by side, a quarter of the tokens each, the last one what is left over too.

    `words` (uint32) hold the streams, each with at least 8 bytes of padding behind it; `bits` tell where each begins,
    and then where it was left; `ends` where it must end, at the latest. `table` holds token · 16 + length for all
    that the next `width` bits may be. Returns whether the streams sufficed.
    """
    quarter, shift = len(out) // 4, U64(64 - width)
    a, b, c, d = bits[0], bits[1], bits[2], bits[3]
    for i in range(0, quarter - 1, 2):
        if (a > ends[0]) | (b > ends[1]) | (c > ends[2]) | (d > ends[3]):
            return False
        u, v, w, x = _window(words, a), _window(words, b), _window(words, c), _window(words, d)
        e, f, g, h = table[u >> shift], table[v >> shift], table[w >> shift], table[x >> shift]
        out[i], out[quarter + i], out[2 * quarter + i], out[3 * quarter + i] = e >> 4, f >> 4, g >> 4, h >> 4
        u, v, w, x = u << U64(e & 15), v << U64(f & 15), w << U64(g & 15), x << U64(h & 15)
        a, b, c, d = a + (e & 15), b + (f & 15), c + (g & 15), d + (h & 15)
        e, f, g, h = table[u >> shift], table[v >> shift], table[w >> shift], table[x >> shift]
        i += 1
        out[i], out[quarter + i], out[2 * quarter + i], out[3 * quarter + i] = e >> 4, f >> 4, g >> 4, h >> 4
        a, b, c, d = a + (e & 15), b + (f & 15), c + (g & 15), d + (h & 15)
    bits[0], bits[1], bits[2], bits[3] = a, b, c, d
    for stream in range(4):
        bit = bits[stream]
        stop = len(out) if stream == 3 else (stream + 1) * quarter
        for i in range(stream * quarter + quarter // 2 * 2, stop):
            if bit > ends[stream]:
                return False
            entry = table[_window(words, bit) >> shift]
            out[i] = entry >> 4
            bit += entry & 15
        bits[stream] = bit
    return True


# ------------------------------------------------------------------------------------- wide symbols and tables


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
    """Puts `width` bits behind the `held` < 8 pending ones, least significant first, and stores whole bytes."""
    pending |= value << held
    held += width
    while held >= 8:
        out[at] = pending & 0xFF
        at, held, pending = at + 1, held - 8, pending >> 8
    return at, held, pending


@compiled
def _read(data, bit, width):
    """Returns `width` ≤ 56 bits from bit number `bit` on; there must be 8 bytes at its byte."""
    value = 0
    for i in range((bit % 8 + width + 7) // 8):
        value |= np.int64(data[bit // 8 + i]) << (8 * i)
    return (value >> (bit % 8)) & ((1 << width) - 1)


@compiled
def split(values, centre, tokens, out):
    """Splits integers into tokens (see tokens.py) and low bits, which are packed; returns the bytes of these."""
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
    """Inverts `split`; returns the bytes used of `data`, whose last 8 are padding.

    Returns −1 where they run out, where an integer is not from `lowest` to `highest`, or where bits are left over.
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
    """Returns a value below 2²⁰, or −1, and the bit behind it."""
    width = order
    while bit < end and width < 20 and not (data[bit // 8] >> (bit % 8)) & 1:
        width, bit = width + 1, bit + 1
    if width == 20 or bit + 1 + width > end:
        return -1, bit
    return _read(data, bit + 1, width) + (1 << width) - (1 << order), bit + 1 + width


@compiled
def golomb_encode(values, order, out):
    """Writes values in the exponential Golomb code of `order`, behind each 0 how many more follow it.

    Returns the bytes written, at most 5 for each value and 5 more.
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
    """Inverts `golomb_encode` for len(out) values; returns the bytes used, or −1 where it never makes such bytes.

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
