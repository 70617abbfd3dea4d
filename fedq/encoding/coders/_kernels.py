"""The inner loops of the entropy coders, compiled by numba on first use; only integers, but for the classes of CABAC.

numba does not check bounds: whatever comes from the wire is checked in here before it is used as an index.
"""

import math

import numpy as np
from numba import njit

_compiled = njit(cache=True, nogil=True)
U64 = np.uint64
LOW = 1 << 16
"""The least state of rANS: states are 32 bits wide, and 16 of them move at a time."""

DIRECT = 1 << 10
"""Integers below this have a token of their own; beyond, one for each eighth of a power of two."""


@_compiled
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


@_compiled
def _push(x, token, table, reciprocals, bits, out, at):
    entry = table[token]
    frequency = entry >> U64(32)
    over = x >= frequency << (U64(32) - bits)  # written without a branch, which would be guessed wrong
    out[at - 1] = np.uint16(x & U64(0xFFFF))
    at -= over
    x >>= U64(over) << U64(4)
    quotient = (x * reciprocals[token]) >> (bits + U64(32))
    return x + (entry & U64(0xFFFFFFFF)) + quotient * ((U64(1) << bits) - frequency), at


@_compiled
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


@_compiled
def _pop(x, table, slots, bits, words, at):
    slot = x & ((U64(1) << bits) - U64(1))
    token = slots[slot]
    entry = table[token]
    x = (entry >> U64(32)) * (x >> bits) + slot - (entry & U64(0xFFFFFFFF))
    longer, under = (x << U64(16)) | U64(words[at]), x < U64(LOW)  # both ways computed: again without a branch
    return longer if under else x, at + under, token


@_compiled
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


@_compiled
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


@_compiled
def _window(words, bit):
    """Returns 64 bits, of which the first 33 at least are those from number `bit` on."""
    return ((U64(words[bit >> 5]) << U64(32)) | U64(words[(bit >> 5) + 1])) << U64(bit & 31)


@_compiled
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


@_compiled
def _length(value):
    """Returns the number of bits of a value of 0 or more."""
    length = 0
    while value:
        value >>= 1
        length += 1
    return length


@_compiled
def _write(out, at, held, pending, value, width):
    """Puts `width` bits behind the `held` < 8 pending ones, least significant first, and stores whole bytes."""
    pending |= value << held
    held += width
    while held >= 8:
        out[at] = pending & 0xFF
        at, held, pending = at + 1, held - 8, pending >> 8
    return at, held, pending


@_compiled
def _read(data, bit, width):
    """Returns `width` ≤ 56 bits from bit number `bit` on; there must be 8 bytes at its byte."""
    value = 0
    for i in range((bit % 8 + width + 7) // 8):
        value |= np.int64(data[bit // 8 + i]) << (8 * i)
    return (value >> (bit % 8)) & ((1 << width) - 1)


@_compiled
def split(values, centre, tokens, out):
    """Splits integers into tokens (see tokens.py) and low bits, which are packed; returns the bytes of these."""
    at, held, pending = 0, 0, 0
    for i in range(len(values)):
        value = np.int64(values[i]) - centre
        size, token = abs(value), abs(value)
        if size >= DIRECT:
            octave = _length(size >> 11)
            width = octave + 7
            token = DIRECT + 8 * octave + ((size >> width) & 7)
            at, held, pending = _write(out, at, held, pending, size & ((1 << width) - 1), width)
        tokens[i] = DIRECT + 175 + (token if value > 0 else -token)
    if held:
        out[at] = pending
        at += 1
    return at


@_compiled
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


@_compiled
def _write_golomb(out, at, held, pending, value, order):
    """Writes a value of 0 or more: the length of value + 2^order in unary, then its bits below the leading one."""
    value += 1 << order
    width = _length(value) - 1
    at, held, pending = _write(out, at, held, pending, 1 << (width - order), width - order + 1)
    return _write(out, at, held, pending, value & ((1 << width) - 1), width)


@_compiled
def _read_golomb(data, bit, end, order):
    """Returns a value below 2²⁰, or −1, and the bit behind it."""
    width = order
    while bit < end and width < 20 and not (data[bit // 8] >> (bit % 8)) & 1:
        width, bit = width + 1, bit + 1
    if width == 20 or bit + 1 + width > end:
        return -1, bit
    return _read(data, bit + 1, width) + (1 << width) - (1 << order), bit + 1 + width


@_compiled
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


@_compiled
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


# ------------------------------------------------------------- context-adaptive binary arithmetic coding (cabac.py)

CLASSES, BINS = 64, 16
FLAGGED = 128
"""Rows of so many symbols, or more, begin with whether they hold any but 0."""

_TOP, _BOTTOM = U64(1 << 48), U64(1 << 32)  # the interval's width stays above the one and below the other
_FIRST, _LAST = 4, 256  # a probability moves by a part of its error, from the one at first to the other
_RATES = np.array([65536 // max(n, 1) for n in range(_LAST + 1)])
_EVEN, _LEAST = 32768, 8  # probabilities in 65,536ths: of what is random, and the smallest of all
_PIECE = 64  # symbols coded between two looks at the room that is left
_ROOM = (_PIECE + 2) * 20  # words: a symbol takes at most 16 decisions of up to 14 bits and 80 of one bit


@_compiled
def _shift(c):
    """Returns how many of a magnitude's lowest bits are taken for random in class c."""
    return max(0, c // 2 - 17)


@_compiled
def cabac_model():
    """Returns the probability of a 1, of 2^32, and the number of the rate at which it moves, of each class and bin.

    In class c magnitudes are about 2^(c/2 − 16) on average, and geometric until it is known better. Behind the last
    class is that of the flags of rows.
    """
    chances, rates = np.full((CLASSES + 1, BINS), _EVEN << 16), np.full((CLASSES + 1, BINS), _FIRST)
    for c in range(CLASSES):
        mean = (1.25 if c % 2 == 0 else 1.75) * 2.0 ** (c // 2 - 16)
        more = mean / (1 + mean)
        for _ in range(_shift(c)):
            more = more * more
        chances[c] = min(max(np.int64(more * 65536), 32), 65536 - 32) << 16
    return chances, rates


@_compiled
def _class(mean, held, bits):
    """Returns the class of a number above 0: two an octave, read off its exponent and its fraction's first bit."""
    held[0] = mean  # `bits` is the same memory
    return min(max((bits[0] >> 51) - 2 * (1023 - 16), 0), CLASSES - 1)


@_compiled
def _learn(chances, rates, c, b, bit):
    n, chance = rates[c, b], chances[c, b]
    aim = (65536 - _LEAST if bit else _LEAST) << 16
    chances[c, b] = chance + ((aim - chance) * _RATES[n] >> 16)
    rates[c, b] = min(n + 1, _LAST)


@_compiled
def _carry(out, at):
    """Adds 1 to the number whose words end before `at`."""
    at -= 1
    while out[at] == 0xFFFF:
        out[at] = 0
        at -= 1
    out[at] += 1


@_compiled
def _put(low, span, bit, chance, out, at):
    """Narrows the interval from `low`, `span` wide, to the part of `bit`; writes the words that are settled.

    That of a 1 is the upper one: where all is 0, `low` is.
    """
    bound = (span >> U64(16)) * U64(chance)
    if bit:
        low += span - bound
        span = bound
        if low >= _TOP:
            low -= _TOP
            _carry(out, at)
    else:
        span -= bound
    while span < _BOTTOM:
        out[at] = low >> U64(32)
        low, span, at = (low << U64(16)) & (_TOP - U64(1)), span << U64(16), at + 1
    return low, span, at


@_compiled
def _with_room(out, at):
    """Returns `out`, or a longer copy where its end is near."""
    return out if len(out) - at >= _ROOM else np.concatenate((out, np.empty_like(out)))


@_compiled
def cabac_encode(rows, centre, signed):
    """Returns the words of 16 bits of the integers of a matrix less `centre`. See cabac.py for the format."""
    height, width = rows.shape
    chances, rates = cabac_model()
    columns, held = np.zeros(width), np.zeros(1)
    bits = held.view(np.int64)
    out = np.empty(rows.size // 64 + _ROOM, np.uint16)
    low, span, at, total, above = U64(0), _TOP - U64(1), 0, 0, 0
    for i in range(height):
        out = _with_room(out, at)
        if width >= FLAGGED:
            some = False
            for j in range(width):
                some |= rows[i, j] != centre
            low, span, at = _put(low, span, some, chances[CLASSES, 0] >> 16, out, at)
            _learn(chances, rates, CLASSES, 0, some)
            if not some:
                continue
        mean, row = (total + 0.25) / (above * width + 4.0), 0
        share = 1 / ((above + 2.0) * mean)
        for start in range(0, width, _PIECE):
            out = _with_room(out, at)
            for j in range(start, min(start + _PIECE, width)):
                value = np.int64(rows[i, j]) - centre
                c = _class((columns[j] + 2 * mean) * share * ((row + 4 * mean) / (j + 4.0)), held, bits)
                size, shift, b = abs(value), _shift(c), 0
                upper = size >> shift
                while b < BINS:
                    bit = upper > b
                    low, span, at = _put(low, span, bit, chances[c, b] >> 16, out, at)
                    _learn(chances, rates, c, b, bit)
                    if not bit:
                        break
                    b += 1
                if b == BINS:  # the rest in the exponential Golomb code
                    rest = upper - BINS + 1
                    length = _length(rest)
                    for k in range(length):
                        low, span, at = _put(low, span, k < length - 1, _EVEN, out, at)
                    for k in range(length - 2, -1, -1):
                        low, span, at = _put(low, span, (rest >> k) & 1, _EVEN, out, at)
                for k in range(shift - 1, -1, -1):
                    low, span, at = _put(low, span, (size >> k) & 1, _EVEN, out, at)
                if size:
                    if signed:
                        low, span, at = _put(low, span, value < 0, _EVEN, out, at)
                    columns[j] += size
                    row += size
        total += row
        above += 1
    # the number in the interval with the most zeros at its end, which are left out
    last = low + _BOTTOM - U64(1)
    if last >= _TOP:
        _carry(out, at)
    out[at] = (last >> U64(32)) & U64(0xFFFF)
    at += 1
    while at and out[at - 1] == 0:
        at -= 1
    return out[:at]


@_compiled
def _get(code, span, chance, words, at):
    """Inverts `_put`: `code` is the number told, less the interval's lower end. Zeros follow the last word."""
    bound = (span >> U64(16)) * U64(chance)
    rest = span - bound
    bit = code >= rest
    if bit:
        code -= rest
        span = bound
    else:
        span = rest
    while span < _BOTTOM:
        code, span = code << U64(16), span << U64(16)
        if at < len(words):
            code |= U64(words[at])
        at += 1
    return bit, code, span, at


@_compiled
def cabac_decode(words, centre, signed, lowest, highest, rows):
    """Inverts `cabac_encode`; returns whether it could have made these words, from integers within these limits.

    `rows` hold `centre` everywhere before.
    """
    height, width = rows.shape
    chances, rates = cabac_model()
    columns, held = np.zeros(width), np.zeros(1)
    bits = held.view(np.int64)
    code, span, at, total, above = U64(0), _TOP - U64(1), 3, 0, 0
    for k in range(3):
        code = (code << U64(16)) | U64(words[k] if k < len(words) else 0)
    if code >= span:
        return False
    for i in range(height):
        if width >= FLAGGED:
            some, code, span, at = _get(code, span, chances[CLASSES, 0] >> 16, words, at)
            _learn(chances, rates, CLASSES, 0, some)
            if not some:
                continue
        mean, row = (total + 0.25) / (above * width + 4.0), 0
        share = 1 / ((above + 2.0) * mean)
        for j in range(width):
            c = _class((columns[j] + 2 * mean) * share * ((row + 4 * mean) / (j + 4.0)), held, bits)
            size, shift, b = 0, _shift(c), 0
            while b < BINS:
                bit, code, span, at = _get(code, span, chances[c, b] >> 16, words, at)
                _learn(chances, rates, c, b, bit)
                if not bit:
                    break
                b += 1
            size = b
            if b == BINS:
                length, bit = 0, True
                while bit and length < 32:
                    bit, code, span, at = _get(code, span, _EVEN, words, at)
                    length += 1
                rest = 1
                for _ in range(length - 1):
                    bit, code, span, at = _get(code, span, _EVEN, words, at)
                    rest = 2 * rest + bit
                size = rest + BINS - 1
            for _ in range(shift):
                bit, code, span, at = _get(code, span, _EVEN, words, at)
                size = 2 * size + bit
            if size:
                bit = False
                if signed:
                    bit, code, span, at = _get(code, span, _EVEN, words, at)
                value = centre - size if bit else centre + size
                if not lowest <= value <= highest:
                    return False
                rows[i, j] = value
                columns[j] += size
                row += size
        if width >= FLAGGED and not row:
            return False  # the flag tells otherwise
        total += row
        above += 1
    # `at` is three words ahead of what was settled; one more than that was written, less zeros at the end
    return code < _BOTTOM and len(words) <= at - 2 and (len(words) == 0 or words[len(words) - 1] != 0)


# ---------------------------------------------------------------------- rates against errors (stages/step.py)


@_compiled
def _cheapest(size, most, mean, weight):
    """Returns the m up to `most` with the least (size − m)² + weight · bits, of geometric magnitudes with this mean."""
    reduced = size - weight / 2 * math.log2(1 + 1 / max(mean, 2.0**-30))
    m = min(math.floor(reduced + 0.5), most)
    return m if m > 0 and m * (2 * reduced - m) >= weight else 0  # `weight`: a sign's bit, that 0 has not


@_compiled
def rate_distortion(values, symbols, step, weight):
    """Moves the symbols of a matrix, in place, as stages.step.rate_distortion_ tells."""
    height, width = symbols.shape
    ends, places = np.zeros(height + 1, np.int64), np.empty(np.count_nonzero(symbols) + 1, np.int32)
    rows, columns = np.zeros(height), np.zeros(width)
    for i in range(height):
        at, some = ends[i], False
        for j in range(width):
            some |= symbols[i, j] != 0
        if some:
            for j in range(width):
                places[at] = j  # without a branch: what is 0 is written over
                at += symbols[i, j] != 0
        for k in range(ends[i], at):
            size = abs(np.int64(symbols[i, places[k]]))
            rows[i] += size
            columns[places[k]] += size
        ends[i + 1] = at
    for last in (False, True):
        own_rows, own_columns, total = np.zeros(height), np.zeros(width), max(rows.sum(), 1.0)
        for i in range(height):
            share = rows[i] / total
            for k in range(ends[i], ends[i + 1]):
                j = places[k]
                plain = np.int64(symbols[i, j])
                size = _cheapest(abs(np.float64(values[i, j])) / step, abs(plain), share * columns[j], weight)
                own_rows[i] += size
                own_columns[j] += size
                if last:
                    symbols[i, j] = size if plain > 0 else -size
        rows, columns = own_rows, own_columns


# --------------------------------------------------------------------------- trellis-coded quantisation (trellis.py)

SEGMENT = 1024
"""Elements from one start in state 0 to the next."""

_LANES = 64  # segments that are searched side by side
F32 = np.float32


@_compiled
def trellis_classes(rows, classes):
    """Writes the class of each symbol of a matrix: as CABAC's, but told by all others of its row and column.

    Returns of each class how many symbols it has, how many of them are above 0, and their sum.
    """
    height, width = rows.shape
    counts, held, columns = np.zeros((CLASSES, 3), np.int64), np.zeros(1), np.zeros(width, np.int64)
    bits = held.view(np.int64)
    for i in range(height):
        for j in range(width):
            columns[j] += rows[i, j]
    mean = (columns.sum() + 0.25) / (height * width + 4.0)
    share = 1 / ((height + 1) * mean * (width + 3))
    for i in range(height):
        row = 4 * mean
        for j in range(width):
            row += rows[i, j]
        for j in range(width):
            size = rows[i, j]
            c = _class((columns[j] - size + 2 * mean) * (row - size) * share, held, bits)
            classes[i, j] = c
            counts[c, 0] += 1
            counts[c, 1] += size > 0
            counts[c, 2] += size
    return counts


@_compiled
def _nearest(value, slope, d):
    """Returns the m = d mod 4 with the least (value − m − ½)² + slope · |m + ½|; where signs may differ, about so."""
    size = max(abs(value) - F32(0.5) * slope, F32(0))
    return F32(4) * np.floor(F32(0.25) * ((size if value > 0 else -size) + (F32(1.5) - d))) + d


@_compiled
def trellis_search(values, classes, costs, centroids, subsets, out):
    """Finds the symbols with the least sum of squared errors and costs (Viterbi 1967) in each segment.

    A symbol s > 0 of class c costs costs[0, c] + costs[1, c] · s, and is decoded as ±(s + ½ + centroids[1]); 0 costs
    nothing, and is decoded as ±(½ + centroids[0]). `values`, `classes` and `out` are flat. A branch to state t comes
    from state t / 2 with subset subsets[t], or from that of the upper half with subsets[t] ^ 2. Returns how many
    symbols are 0 and how many are not, and the sums of what their values are beyond ±(s + ½).
    """
    states, length = len(subsets), min(SEGMENT, len(values))
    half, found = states // 2, np.zeros((2, 2))
    given, branch = np.zeros((3, length, _LANES), F32), np.empty((4, _LANES), F32)
    value, start, slope = given[0], given[1], given[2]
    cost, better = np.empty((states, _LANES), F32), np.empty((states, _LANES), F32)
    taken = np.empty((length, _LANES), np.uint32)  # from the upper half: a bit for each state
    first, shift = F32(0.5 + centroids[0]), F32(centroids[1])
    for group in range(0, len(values), SEGMENT * _LANES):
        for lane in range(_LANES):
            begin = group + lane * SEGMENT
            for i in range(length):
                inside = begin + i < len(values)  # behind the end there are zeros
                value[i, lane] = values[begin + i] if inside else 0
                start[i, lane] = costs[0, classes[begin + i]] if inside else 0
                slope[i, lane] = costs[1, classes[begin + i]] if inside else 0
        cost[:] = 1e30
        cost[0] = 0
        for i in range(length):
            for d in range(4):
                for lane in range(_LANES):
                    v, a = value[i, lane], slope[i, lane]
                    point = _nearest(v, a, F32(d)) + F32(0.5)
                    size = abs(point)
                    error = (v if point > 0 else -v) - (size + shift if size > 1 else first)
                    more = start[i, lane] + a * (size - F32(0.5)) if size > 1 else F32(0)
                    branch[d, lane] = error * error + more - cost[0, lane]
            taken[i] = 0
            for t in range(states):
                d = subsets[t]
                for lane in range(_LANES):
                    lower = cost[t >> 1, lane] + branch[d, lane]
                    upper = cost[(t >> 1) + half, lane] + branch[d ^ 2, lane]
                    better[t, lane] = upper if upper < lower else lower
                    taken[i, lane] |= np.uint32(upper < lower) << np.uint32(t)
            cost, better = better, cost
        for lane in range(_LANES):
            begin, state = group + lane * SEGMENT, np.argmin(cost[:, lane])
            for i in range(length - 1, -1, -1):
                upper = np.int64((taken[i, lane] >> np.uint32(state)) & np.uint32(1))
                if begin + i < len(values):
                    # in float64, which holds all m
                    v, d = np.float64(values[begin + i]), np.float64(subsets[state] ^ (2 * upper))
                    point = _nearest(v, costs[1, classes[begin + i]], d) + 0.5
                    size = np.int64(abs(point))
                    out[begin + i] = size
                    found[0, int(size > 0)] += 1
                    found[1, int(size > 0)] += (v if point > 0 else -v) - abs(point)
                state = (state >> 1) + half * upper
    return found


@_compiled
def trellis_signs(symbols, steps, out):
    """Writes the signs, 1 or −1: steps[s, symbol mod 4] is twice the state behind s, and 1 more for a minus."""
    state = 0
    for i in range(len(symbols)):
        entry = steps[state if i % SEGMENT else 0, symbols[i] & 3]
        out[i] = 1 - 2 * (entry & 1)
        state = entry >> 1
