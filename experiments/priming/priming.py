"""Measures the bits that a coder saves if it continues after an earlier message instead of starting anew.

python -m experiments.priming.priming [--tensors outputs/tensors.npz] > TABLE.md

CABAC codes each matrix of symbols of an upload of `encoder=frontier` alone, and after the rows of the same matrix of
an earlier message. Classes, probabilities and column scales then continue from the earlier rows. Bits count real bytes,
minus the bytes of the earlier rows alone.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from experiments.tensors.tensors import TENSORS, load
from fedq.encoding import CABAC, Key, SingularVectors, StepQuantization, TensorSpec

RATE = 0.1
EARLIER = {"weights15": 4.0, "round5": 1.5}  # a broadcast and another client's upload, with the steps of `frontier`
UPLOAD, STEP = "round15", 1.5


def symbols(path: Path, state: str, step: float) -> dict[str, Tensor]:
    """Returns the matrices of integers that the chain of `frontier` codes, of all tensors."""
    tensors = {name: torch.from_numpy(value) for name, value in load(path, state).items()}
    elements = torch.cat([value.reshape(-1) for value in tensors.values()])
    scale = float(elements.square().mean().sqrt())
    vectors = SingularVectors(step, rate_weight=RATE)
    rest = StepQuantization(step, relative=False, rate_weight=RATE, centroids=True)
    found = {}
    for name, value in tensors.items():
        left, side = vectors.encode(value / scale, Key(0))
        found[f"{name}/rest"] = rest.encode(left, Key(0))[0].reshape(TensorSpec.of(left).matrix)
        found |= {f"{name}/{part}": matrix for part, matrix in side.items() if part != "values"}
    return found


def coded(matrix: Tensor) -> int:
    """Returns the bits of a matrix of integers."""
    return 8 * len(CABAC().encode(matrix, TensorSpec.of(matrix)))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=Path, default=TENSORS)
    path = parser.parse_args().tensors
    upload = symbols(path, UPLOAD, STEP)
    bits = {"alone": Counter({name: coded(matrix) for name, matrix in upload.items()})}
    for state, step in EARLIER.items():
        before = symbols(path, state, step)
        bits[f"behind {state}"] = Counter(
            {name: coded(torch.cat((before[name], matrix))) - coded(before[name]) for name, matrix in upload.items()}
        )
    print("| | vectors, bits | the rest, bits | together |\n|---|---|---|---|")
    whole = bits["alone"].total()
    for way, counts in bits.items():
        rest = sum(count for name, count in counts.items() if name.endswith("/rest"))
        saved = f" ({100 * (counts.total() / whole - 1):+.1f} %)"
        print(f"| {way} | {counts.total() - rest:,} | {rest:,} | {counts.total():,}{saved} |")


if __name__ == "__main__":
    main()
