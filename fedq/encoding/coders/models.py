"""Distributions that both sides compute from two or three small integers, with the same bits.

Machines differ in the last bit of exp, log and erf, so two sides could compute different frequencies. IEEE 754 defines
every bit of +, −, ×, ÷ and the square root. So frequencies use only these: e⁻ᵗ is (1 / (1 + u + u²/2))^(2²⁰) with u = t
/ 2²⁰, with an error of 10⁻⁹, and a power is a product. Only the search for the best law uses other functions.
"""

import struct

import numpy as np

from fedq.encoding.coders import tokens

BITS = 16
"""Frequencies sum to 2^BITS."""

_WIRE = struct.Struct("<HiB")  # the scale, the location in 256ths, Student's degrees of freedom (else 0)
SIZE = _WIRE.size
_SCALES = 16 * 38  # 16 an octave, from 2⁻⁴
_FREEDOMS = (1, 2, 3, 5, 10)
_POINTS = 4  # the density, averaged over a token's integers


def take(family: str, data: memoryview, edges: np.ndarray) -> tuple[np.ndarray, memoryview]:
    """Reads a family's parameters: returns the frequencies and the rest of `data`."""
    (scale, location, freedom), rest = tokens.take(_WIRE, data)
    if scale >= _SCALES or freedom not in (_FREEDOMS if family == "student" else (0,)):
        raise ValueError(f"no {family} distribution has scale {scale} and {freedom} degrees of freedom")
    return _frequencies(family, scale, location, freedom, edges), rest


def fit(family: str, counts: np.ndarray, edges: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Returns the best parameters found for the counted tokens, and the frequencies.

    The location of a "normal" distribution is the mean, otherwise the median. The search for the scale starts at the
    mean distance from the location.

    edges: the limits between the tokens' integers (float64, one more than tokens).
    """
    middle, total = (edges[1:] + edges[:-1]) / 2, int(counts.sum())
    below = np.cumsum(counts)
    half = int(np.searchsorted(below, total / 2))
    location = edges[half + 1] - (below[half] - total / 2) / counts[half] * (edges[half + 1] - edges[half])
    if family == "normal":
        location = float((counts * middle).sum()) / total
    place = int(np.clip(np.rint(256 * location), -(2**31), 2**31 - 1))
    spread = max(2.0**-4, float((counts * np.abs(middle - location)).sum()) / total)
    exponent = int(np.floor(np.log2(spread)))
    start = 16 * (exponent + 4) + int(16 * (spread / 2.0**exponent - 1))

    def cost(scale: int, freedom: int) -> float:
        return -float((counts * np.log2(_frequencies(family, scale, place, freedom, edges))).sum())

    choices = []
    for freedom in _FREEDOMS if family == "student" else (0,):
        scale, least = start, cost(start, freedom)
        for step in (16, 4, 1):
            for direction in (-step, step):
                while 0 <= scale + direction < _SCALES and (found := cost(scale + direction, freedom)) < least:
                    scale, least = scale + direction, found
        choices.append((least, scale, freedom))
        start = scale  # the best scale of the next freedom is near
    _, scale, freedom = min(choices)
    return _WIRE.pack(scale, place, freedom), _frequencies(family, scale, place, freedom, edges)


def _frequencies(family: str, scale: int, location: int, freedom: int, edges: np.ndarray) -> np.ndarray:
    """Returns frequencies of tokens, in proportion to the density over their integers."""
    unit = np.ldexp(16.0 + scale % 16, scale // 16 - 8)
    widths, masses = np.diff(edges), np.zeros(len(edges) - 1)
    for point in range(_POINTS):
        distance = np.abs(edges[:-1] + widths * ((2 * point + 1) / (2 * _POINTS)) - location / 256) / unit
        masses += _density(family, distance, freedom)
    masses *= widths
    peak = masses.max()
    if peak < 2.0**-900:  # so far away that the density is a denormal number, which some threads treat as 0
        return tokens.normalise(np.ones(len(masses), np.int64), BITS)
    return tokens.normalise(np.floor(masses / peak * 2.0**30).astype(np.int64), BITS)


def _density(family: str, distance: np.ndarray, freedom: int) -> np.ndarray:
    """Returns the density, without its constant factor, at a distance in units of the scale."""
    if family == "student":
        root = np.sqrt(1 / (1 + distance * distance / freedom))
        power: np.ndarray = root
        for _ in range(freedom):
            power = power * root
        return power
    u = (distance * distance / 2 if family == "normal" else distance) / 2.0**20
    power = np.divide(1, 1 + u + u * u / 2)
    for _ in range(20):
        power = power * power
    return power
