"""Distributions that both sides of the wire compute alike from two or three small integers.

Machines differ in the last bit of exp, log and erf, which could give one side another frequency. IEEE 754 leaves no
choice for +, −, ×, ÷ and the square root, so that nothing else is used for what travels: e⁻ᵗ is
(1 / (1 + u + u²/2))^(2²⁰) with u = t / 2²⁰, right to 10⁻⁹, and a power is a product. Only the fit uses more.
"""

import struct

import numpy as np

from fedq.encoding.coders import tokens as shared

BITS = 16
"""The bits of the sum of the frequencies."""

_WIRE = struct.Struct("<HiB")  # the scale, the location in 256ths, Student's degrees of freedom (else 0)
SIZE = _WIRE.size
_SCALES = 16 * 38  # 16 an octave, from 2⁻⁴
_FREEDOMS = (1, 2, 3, 5, 10)
_POINTS = 4  # at which the density is averaged over a token's integers


def take(family: str, data: memoryview, edges: np.ndarray) -> tuple[np.ndarray, memoryview]:
    """Reads the parameters of a family; returns the frequencies and the rest of `data`."""
    (scale, location, freedom), rest = shared.take(_WIRE, data)
    if scale >= _SCALES or freedom not in (_FREEDOMS if family == "student" else (0,)):
        raise ValueError(f"no {family} distribution has scale {scale} and {freedom} degrees of freedom")
    return _frequencies(family, scale, location, freedom, edges), rest


def fit(family: str, counts: np.ndarray, edges: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Returns the parameters that code the counted tokens in the fewest bits found, and the frequencies.

    The location is the mean for `normal`, else the median; the scale is searched from the mean distance to it.
    `edges` (float64, one more than tokens) are where the tokens' integers begin and end.
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
        start = scale  # from one to the next it moves little
    _, scale, freedom = min(choices)
    return _WIRE.pack(scale, place, freedom), _frequencies(family, scale, place, freedom, edges)


def _frequencies(family: str, scale: int, location: int, freedom: int, edges: np.ndarray) -> np.ndarray:
    """Returns the frequencies of the tokens, each in proportion to the density over its integers."""
    unit = np.ldexp(16.0 + scale % 16, scale // 16 - 8)
    widths, masses = np.diff(edges), np.zeros(len(edges) - 1)
    for point in range(_POINTS):
        distance = np.abs(edges[:-1] + widths * ((2 * point + 1) / (2 * _POINTS)) - location / 256) / unit
        masses += _density(family, distance, freedom)
    masses *= widths
    peak = masses.max()
    if peak < 2.0**-900:  # so far off that denormal numbers, which some threads take for 0, could matter
        return shared.normalise(np.ones(len(masses), np.int64), BITS)
    return shared.normalise(np.floor(masses / peak * 2.0**30).astype(np.int64), BITS)


def _density(family: str, distance: np.ndarray, freedom: int) -> np.ndarray:
    """Returns the density at a distance in units of the scale, but for a factor."""
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
