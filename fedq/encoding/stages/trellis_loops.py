"""The loops of TrellisQuantization (see trellis.py)."""

import numpy as np

from fedq.encoding.coders.cabac_loops import CLASSES, class_of
from fedq.encoding.compiled import compiled

SEGMENT = 1024
"""Elements from one start of the trellis in state 0 to the next."""

_LANES = 64  # segments searched side by side
F32 = np.float32


@compiled
def trellis_classes(rows, classes):
    """Writes the class of each symbol of a matrix, like CABAC, but from all other symbols of its row and column.

    Returns for each class the number of symbols, the number of symbols above 0, and their sum.
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
            c = class_of((columns[j] - size + 2 * mean) * (row - size) * share, held, bits)
            classes[i, j] = c
            counts[c, 0] += 1
            counts[c, 1] += size > 0
            counts[c, 2] += size
    return counts


@compiled
def _nearest(value, slope, d):
    """Returns the m = d mod 4 with about the least (value − m − ½)² + slope · |m + ½|; exact if signs agree."""
    size = max(abs(value) - F32(0.5) * slope, F32(0))
    return F32(4) * np.floor(F32(0.25) * ((size if value > 0 else -size) + (F32(1.5) - d))) + d


@compiled
def trellis_search(values, classes, costs, centroids, subsets, out):
    """Finds the symbols with the least sum of squared errors and costs (Viterbi 1967) in each segment.

    A symbol s > 0 of class c costs costs[0, c] + costs[1, c] · s, and is decoded as ±(s + ½ + centroids[1]). The symbol
    0 costs nothing, and is decoded as ±(½ + centroids[0]). `values`, `classes` and `out` are flat. A branch to state t
    comes from state t / 2 with the subset subsets[t], or from the state of the upper half with subsets[t] ^ 2. Returns,
    for symbols 0 and above 0: their number, and the sum of their values' magnitudes less s + ½.
    """
    states, length = len(subsets), min(SEGMENT, len(values))
    half, found = states // 2, np.zeros((2, 2))
    given, branch = np.zeros((3, length, _LANES), F32), np.empty((4, _LANES), F32)
    value, start, slope = given[0], given[1], given[2]
    cost, better = np.empty((states, _LANES), F32), np.empty((states, _LANES), F32)
    taken = np.empty((length, _LANES), np.uint32)  # a bit for each state, 1 if the branch comes from the upper half
    first, shift = F32(0.5 + centroids[0]), F32(centroids[1])
    for group in range(0, len(values), SEGMENT * _LANES):
        for lane in range(_LANES):
            begin = group + lane * SEGMENT
            for i in range(length):
                inside = begin + i < len(values)  # zeros follow the end
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


@compiled
def trellis_signs(symbols, steps, out):
    """Writes the signs, 1 or −1: steps[s, symbol mod 4] is twice the state after s, plus 1 for a minus."""
    state = 0
    for i in range(len(symbols)):
        entry = steps[state if i % SEGMENT else 0, symbols[i] & 3]
        out[i] = 1 - 2 * (entry & 1)
        state = entry >> 1
