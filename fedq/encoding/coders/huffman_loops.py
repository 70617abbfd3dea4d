"""The loops of Huffman codes (see huffman.py): integers only."""

import numpy as np

from fedq.encoding.compiled import compiled

U64 = np.uint64


@compiled
def huffman_encode(tokens, codes, lengths, out):
    """Writes the codes, most significant bit first, into words (uint32, at least len(tokens) / 2 + 1); returns bits."""
    at, held, pending = 0, U64(0), U64(0)
    for i in range(len(tokens)):
        length = U64(lengths[tokens[i]])
        pending = (pending << length) | U64(codes[tokens[i]])
        held += length
        full = held >= U64(32)  # without a branch: the next word replaces a word that is not full yet
        out[at] = (pending >> (held - U64(32) if full else U64(0))) & U64(0xFFFFFFFF)
        at += full
        held -= U64(full) << U64(5)
    out[at] = (pending << (U64(32) - held)) & U64(0xFFFFFFFF)
    return 32 * at + np.int64(held)


@compiled
def _window(words, bit):
    """Returns 64 bits; at least the first 33 are the stream's bits from number `bit` on."""
    return ((U64(words[bit >> 5]) << U64(32)) | U64(words[(bit >> 5) + 1])) << U64(bit & 31)


@compiled
def huffman_decode(words, bits, ends, table, width, out):
    """Reads four streams side by side. Each has a quarter of the tokens; the last also has the rest.

    `words` (uint32) hold the streams, each with at least 8 bytes of padding after it. `bits` hold the first bit of each
    stream; the loop replaces them by the bit after its last token. `ends` hold the bit after each stream. `table`
    holds token · 16 + length for all values of the next `width` bits. Returns whether the streams are long enough.
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
