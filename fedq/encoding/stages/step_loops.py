"""The loops of StepQuantization (see step.py)."""

import math

import numpy as np

from fedq.encoding.compiled import compiled


@compiled
def _cheapest(size, most, mean, weight):
    """Returns the m up to `most` with the least (size − m)² + weight · bits, for geometric magnitudes of this mean."""
    reduced = size - weight / 2 * math.log2(1 + 1 / max(mean, 2.0**-30))
    m = min(math.floor(reduced + 0.5), most)
    return m if m > 0 and m * (2 * reduced - m) >= weight else 0  # `weight`: only m > 0 has a sign's bit


@compiled
def cheapest_symbols(values, units, step, weight, symbols):
    """Writes the symbols of a matrix, as step.rate_distortion describes; `units` are the step and ½ in its dtype.

    Returns the number of symbols other than 0, and the sum of (element's magnitude in steps − symbol's magnitude).
    """
    height, width = values.shape
    unit, half, ends = units[0], units[1], np.zeros(height + 1, np.int64)
    for i in range(height):
        found = 0
        for j in range(width):
            scaled = values[i, j] / unit
            symbols[i, j] = np.int32(scaled + (half if scaled > 0 else -half))  # the cast rounds towards 0
            found += symbols[i, j] != 0
        ends[i + 1] = ends[i] + found
    places = np.empty(ends[height] + 1, np.int32)
    rows, columns = np.zeros(height), np.zeros(width)
    for i in range(height):
        at = ends[i]
        if ends[i + 1] > at:
            for j in range(width):
                places[at] = j  # no branch: the next symbol overwrites the place of a 0
                at += symbols[i, j] != 0
        for k in range(ends[i], at):
            size = abs(np.int64(symbols[i, places[k]]))
            rows[i] += size
            columns[places[k]] += size
    kept, excess = 0, 0.0
    for last in (False, True):
        own_rows, own_columns, total = np.zeros(height), np.zeros(width), max(rows.sum(), 1.0)
        for i in range(height):
            share = rows[i] / total
            for k in range(ends[i], ends[i + 1]):
                j = places[k]
                plain, exact = np.int64(symbols[i, j]), abs(np.float64(values[i, j])) / step
                size = _cheapest(exact, abs(plain), share * columns[j], weight)
                own_rows[i] += size
                own_columns[j] += size
                if last:
                    symbols[i, j] = size if plain > 0 else -size
                    if size:
                        kept += 1
                        excess += exact - size
        rows, columns = own_rows, own_columns
    return kept, excess
