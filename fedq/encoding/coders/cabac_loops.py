"""The loops of CABAC (see cabac.py): integers only, but for the classes.

numba checks no bounds, so a loop checks received values before it uses them as an index.
"""

import numpy as np

from fedq.encoding.coders.tokens_loops import bit_length
from fedq.encoding.compiled import compiled

U64 = np.uint64
CLASSES, BINS = 64, 16
FLAGGED = 128
"""Rows of this many symbols, or more, begin with a flag: whether they hold a symbol other than 0."""

_TOP, _BOTTOM = U64(1 << 48), U64(1 << 32)  # the interval's width stays between both
_FIRST, _LAST = 4, 256  # a probability moves by 1/4 of its error at first, by 1/256 in the end
_RATES = np.array([65536 // max(n, 1) for n in range(_LAST + 1)])
_EVEN, _LEAST = 32768, 8  # probabilities in 65,536ths: of random bits, and the smallest
_PIECE = 64  # symbols coded between two checks of the room left
_ROOM = (_PIECE + 2) * 20  # words: a symbol takes at most 16 decisions of up to 14 bits and 80 of one bit


@compiled
def _shift(c):
    """Returns how many of a magnitude's lowest bits count as random in class c."""
    return max(0, c // 2 - 17)


@compiled
def cabac_model():
    """Returns, for each class and bin, the probability of a 1 (in units of 2^−32) and its rate's number.

    In class c magnitudes start as geometric, with a mean of about 2^(c/2 − 16). The last class is for the flags of
    rows.
    """
    chances, rates = np.full((CLASSES + 1, BINS), _EVEN << 16), np.full((CLASSES + 1, BINS), _FIRST)
    for c in range(CLASSES):
        mean = (1.25 if c % 2 == 0 else 1.75) * 2.0 ** (c // 2 - 16)
        more = mean / (1 + mean)
        for _ in range(_shift(c)):
            more = more * more
        chances[c] = min(max(np.int64(more * 65536), 32), 65536 - 32) << 16
    return chances, rates


@compiled
def class_of(mean, held, bits):
    """Returns the class of a number above 0: two an octave, from its exponent and its fraction's first bit."""
    held[0] = mean  # `bits` views the same memory as integers
    return min(max((bits[0] >> 51) - 2 * (1023 - 16), 0), CLASSES - 1)


@compiled
def _learn(chances, rates, c, b, bit):
    n, chance = rates[c, b], chances[c, b]
    aim = (65536 - _LEAST if bit else _LEAST) << 16
    chances[c, b] = chance + ((aim - chance) * _RATES[n] >> 16)
    rates[c, b] = min(n + 1, _LAST)


@compiled
def _carry(out, at):
    """Adds 1 to the number whose words end before `at`."""
    at -= 1
    while out[at] == 0xFFFF:
        out[at] = 0
        at -= 1
    out[at] += 1


@compiled
def _put(low, span, bit, chance, out, at):
    """Narrows the interval (start `low`, width `span`) to the part of `bit`, and writes the words that are now final.

    The upper part belongs to a 1, so that bits of zeros leave `low` at 0.
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


@compiled
def _with_room(out, at):
    """Returns `out`, or a longer copy if its end is near."""
    return out if len(out) - at >= _ROOM else np.concatenate((out, np.empty_like(out)))


@compiled
def cabac_encode(rows, centre, signed):
    """Returns the 16-bit words of a matrix of integers less `centre`. See cabac.py for the format."""
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
                c = class_of((columns[j] + 2 * mean) * share * ((row + 4 * mean) / (j + 4.0)), held, bits)
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
                    length = bit_length(rest)
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
    # the number in the interval with the most zeros at its end, which are not sent
    last = low + _BOTTOM - U64(1)
    if last >= _TOP:
        _carry(out, at)
    out[at] = (last >> U64(32)) & U64(0xFFFF)
    at += 1
    while at and out[at - 1] == 0:
        at -= 1
    return out[:at]


@compiled
def _get(code, span, chance, words, at):
    """Inverts `_put`: `code` is the number received, less the interval's lower end. Zeros follow the last word."""
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


@compiled
def cabac_decode(words, centre, signed, lowest, highest, rows):
    """Inverts `cabac_encode`; returns whether the words are an encoding of integers within the limits.

    `rows` must hold `centre` everywhere.
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
            c = class_of((columns[j] + 2 * mean) * share * ((row + 4 * mean) / (j + 4.0)), held, bits)
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
            return False  # the flag promises a symbol other than 0
        total += row
        above += 1
    # `at` is three words ahead of the settled words; the encoder wrote one more, less zeros at the end
    return code < _BOTTOM and len(words) <= at - 2 and (len(words) == 0 or words[len(words) - 1] != 0)
