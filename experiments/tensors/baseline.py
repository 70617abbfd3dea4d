"""Describes the largest tensor of each state, and the bits that an ideal coder of single symbols needs for it.

python -m experiments.tensors.baseline [--tensors outputs/tensors.npz]

The table has one row a state, for dense1.weight (512 outputs × 3136 inputs):

energy, zero rows, columns   shares of the state's energy, and of rows and columns that are all zero
rank                         least rank of a matrix within −9.3 dB
N σ: bits, dB                elements rounded to the nearest multiple of N standard deviations: entropy of the symbols
                             in bits an element, and NMSE if each symbol decodes to the mean of its elements
"""

import argparse
from pathlib import Path

import numpy as np

from experiments.tensors.tensors import STATES, TENSORS, load

STEPS = (1.0, 1.5, 2.0, 3.0, 4.0)


def entropy_and_error(x: np.ndarray, step: float) -> tuple[float, float]:
    """Returns the bits an element and the NMSE, not in decibels, of `x` rounded to multiples of `step`."""
    _, symbols, counts = np.unique(np.rint(x / step), return_inverse=True, return_counts=True)
    symbols, shares = symbols.ravel(), counts / x.size
    centroids = np.bincount(symbols, x.ravel()) / counts
    error = np.square(x.ravel() - centroids[symbols]).sum() / np.square(x).sum()
    return float(-(shares * np.log2(shares)).sum()), float(error)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=Path, default=TENSORS)
    path: Path = parser.parse_args().tensors
    print("state     energy  zero rows  columns  rank", *(f"   {step} σ: bits, dB" for step in STEPS))
    for state in STATES:
        tensors = {name: x.astype(np.float64) for name, x in load(path, state).items()}
        x = tensors["dense1.weight"]
        energy = np.square(x).sum() / sum(np.square(other).sum() for other in tensors.values())
        rows, columns = ((~x.any(axis=axis)).mean() for axis in (1, 0))
        squares = np.square(np.linalg.svd(x, compute_uv=False))
        rank = 1 + int((1 - np.cumsum(squares) / squares.sum() > 10**-0.93).sum())
        print(f"{state:9} {energy:6.1%} {rows:10.1%} {columns:8.1%} {rank:5}", end=" ")
        for step in STEPS:
            bits, error = entropy_and_error(x, step * x.std())
            print(f"   {bits:7.4f} {10 * np.log10(error):7.2f}", end=" ")
        print()


if __name__ == "__main__":
    main()
