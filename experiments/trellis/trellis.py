"""Compares trellis-coded and scalar quantisation at equal error, on real updates and in real bytes.

python -m experiments.trellis.trellis [--tensors outputs/tensors.npz]

All messages are decoded. The first table has the NMSE of half a million normal numbers at given bits. The second table
has bits an element at given decibels, of dense1.weight and of all tensors of each state, with one step. Brackets hold
the difference from scalar quantisation in per cent.

scalar    StepQuantization with centroids and a rate_weight of 0.1, then CABAC
N states  TrellisQuantization with the same rate_weight, then CABAC
vectors   SingularVectors of the same step before either
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.tensors.tensors import STATES, TENSORS, load
from fedq.encoding import (
    CABAC,
    Encoder,
    EncodingStage,
    Key,
    SingularVectors,
    StateDictEncoder,
    StepQuantization,
    TrellisQuantization,
    schema_of,
)

BITS = (0.25, 0.5, 1, 1.5, 2, 3)
DECIBELS = (-3, -4.5, -6, -9, -12, -18)
STEPS = 2.0 ** np.arange(-2, 5.1, 0.25)  # in units of the root mean square
WEIGHT = 0.1


def encoder(states: int, vectors: bool, step: float) -> StateDictEncoder:
    """Returns the chain of a trellis with `states`, or of scalar quantisation for 0."""
    before: list[EncodingStage] = [SingularVectors(step, rate_weight=WEIGHT)] if vectors else []
    if states:
        chain = Encoder([*before, TrellisQuantization(step, states, False, WEIGHT)], CABAC(signed=False))
    else:
        chain = Encoder([*before, StepQuantization(step, False, centroids=True, rate_weight=WEIGHT)], CABAC())
    return StateDictEncoder(chain, threshold=0)


def curve(tensors: dict[str, Tensor], states: int, vectors: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns decibels and bits an element for all steps, smallest step first."""
    energy = sum(float(x.double().square().sum()) for x in tensors.values())
    numel, decibels, bits = sum(x.numel() for x in tensors.values()), [], []
    for step in STEPS * math.sqrt(energy / numel):
        codec = encoder(states, vectors, float(step)).bind(schema_of(tensors))
        message, _ = codec.encode(tensors, Key(1))
        back, _ = codec.decode(message, Key(1))
        error = sum(float((back[name] - x).double().square().sum()) for name, x in tensors.items())
        decibels.append(10 * math.log10(error / energy))
        bits.append(8 * len(message) / numel)
    return np.array(decibels), np.array(bits)


def row(*cells: str) -> None:
    """Prints a row of a table."""
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=Path, default=TENSORS)
    path: Path = parser.parse_args().tensors
    torch.set_num_threads(1)
    normal = {"x": torch.from_numpy(Key(7).generator().normal(size=(512, 1024))).float()}
    row("normal, NMSE", *(f"{bits} bits" for bits in BITS))
    row(*["---"] * (1 + len(BITS)))
    row("Shannon", *(f"{4.0**-bits:.4f}" for bits in BITS))
    for states in (0, 4, 8, 16, 32):
        decibels, bits = curve(normal, states)
        errors = 10 ** (np.interp(BITS, bits[::-1], decibels[::-1]) / 10)
        row(f"{states} states" if states else "scalar", *(f"{error:.4f}" for error in errors))
    print()
    row("bits an element", "", *(f"{decibels:g} dB" for decibels in DECIBELS))
    row(*["---"] * (2 + len(DECIBELS)))
    for state in STATES:
        tensors = {name: torch.from_numpy(x) for name, x in load(path, state).items()}
        large = {"x": tensors["dense1.weight"]}
        for name, chosen, vectors in (("dense1.weight", large, False), ("all", tensors, False), ("all", tensors, True)):
            scalar = np.full(len(DECIBELS), math.nan)
            for states in (0, 8, 32):
                bits = np.interp(DECIBELS, *curve(chosen, states, vectors), left=math.nan, right=math.nan)
                scalar = scalar if states else bits
                more = [f" ({share:+.1%})" if states else "" for share in bits / scalar - 1]
                label = ("vectors, " if vectors else "") + (f"{states} states" if states else "scalar")
                cells = (f"{b:.4f}{m}" if b > 0 else "" for b, m in zip(bits, more, strict=True))
                row(f"{state}, {name}", label, *cells)


if __name__ == "__main__":
    main()
