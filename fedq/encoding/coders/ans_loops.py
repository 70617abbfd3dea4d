"""The loops of ANS (see ans.py): integers only.

numba checks no bounds, so a loop checks received values before it uses them as an index.
"""

import numpy as np

from fedq.encoding.compiled import compiled

U64 = np.uint64
LOW = 1 << 16
"""The least state of rANS: states are 32 bits wide, and 16 of them move at a time."""


@compiled
def _push(x, token, table, reciprocals, bits, out, at):
    entry = table[token]
    frequency = entry >> U64(32)
    over = x >= frequency << (U64(32) - bits)  # no branch here: the processor would mispredict it
    out[at - 1] = np.uint16(x & U64(0xFFFF))
    at -= over
    x >>= U64(over) << U64(4)
    quotient = (x * reciprocals[token]) >> (bits + U64(32))
    return x + (entry & U64(0xFFFFFFFF)) + quotient * ((U64(1) << bits) - frequency), at


@compiled
def rans_encode(tokens, table, reciprocals, bits, out, at, states):
    """Codes tokens from the last to the first, and writes 16-bit words downwards from `at`; returns the last place.

    Token i goes to state i mod 4; tokens of an incomplete last group go to state 0. `table` holds frequency · 2³² +
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
    longer, under = (x << U64(16)) | U64(words[at]), x < U64(LOW)  # both results are computed: no branch
    return longer if under else x, at + under, token


@compiled
def rans_decode(words, at, table, slots, bits, out, states):
    """Reads len(out) tokens; returns the place after them, or −1 if words are missing.

    The last four words are padding.
    """
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
