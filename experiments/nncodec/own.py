"""Encodes the saved tensors with fedq's chains, and prints bits a parameter at round decibels.

python -m experiments.nncodec.own [--tensors outputs/tensors.npz]

Each point is a message of all tensors of a state, with one step, which is decoded again. Seconds are the least of five,
with one thread. No tensor is sent exact. The chains:

ANS           nearest rounding and an entropy coder of single symbols, for comparison
CABAC         the same symbols, coded by the scales of their rows and columns
RDOQ          symbols chosen by error and bits, and CABAC
singular      singular vectors, then symbols chosen by error and bits, and CABAC: encoder=frontier
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from experiments.nncodec.peer import DENSE, TARGETS, hull
from experiments.tensors.tensors import STATES, TENSORS, load
from fedq.encoding import (
    ANS,
    CABAC,
    Encoder,
    EncodingStage,
    Key,
    SingularVectors,
    StateDictEncoder,
    StepQuantization,
    schema_of,
)

STEPS = [2 ** (i / 2) for i in range(-3, 10)]  # in units of the root mean square over all tensors
WEIGHT = 0.1  # of the rate
Point = tuple[float, float, float, float, float]


def chain(name: str, step: float) -> StateDictEncoder:
    """Returns the encoder of a chain, with a step in root mean squares."""
    weight = WEIGHT if name in ("RDOQ", "singular") else 0.0
    stages: list[EncodingStage] = [StepQuantization(step, relative=False, centroids=True, rate_weight=weight)]
    if name == "singular":
        stages.insert(0, SingularVectors(step, 32, weight))
    return StateDictEncoder(Encoder(stages, ANS() if name == "ANS" else CABAC()), 0, common_scale=True)


def measure(tensors: dict[str, torch.Tensor], name: str) -> Iterator[Point]:
    """Yields bits a parameter, decibels of all and of the large tensor, seconds to encode and to decode."""
    size = sum(x.numel() for x in tensors.values())
    energy = {key: float(x.double().square().sum()) for key, x in tensors.items()}
    for step in STEPS:
        codec, encode, decode = chain(name, step).bind(schema_of(tensors)), math.inf, math.inf
        for _ in range(5):
            started = perf_counter()
            message, _ = codec.encode(tensors, Key(0))
            encoded = perf_counter()
            received, _ = codec.decode(message, Key(0))
            encode, decode = min(encode, encoded - started), min(decode, perf_counter() - encoded)
        error = {key: float((received[key] - x).double().square().sum()) for key, x in tensors.items()}
        total = 10 * math.log10(sum(error.values()) / sum(energy.values()))
        yield 8 * len(message) / size, total, 10 * math.log10(error[DENSE] / energy[DENSE]), encode, decode


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=Path, default=TENSORS)
    path: Path = parser.parse_args().tensors
    torch.set_num_threads(1)
    print(f"{'all parameters, bits':25}", *(f"{target:>6} dB" for target in TARGETS), " M elements/s to encode, decode")
    for state in (*STATES, "weights5"):
        tensors = {name: torch.from_numpy(x) for name, x in load(path, state).items()}
        size = sum(x.numel() for x in tensors.values())
        for name in ("ANS", "CABAC", "RDOQ", "singular"):
            points = list(measure(tensors, name))
            x, y = zip(*reversed(hull([(bits, decibels) for bits, decibels, *_ in points])), strict=True)
            cells = (f"{np.interp(target, y, x, left=math.nan, right=math.nan):9.4f}" for target in TARGETS)
            speeds = [size / 1e6 / float(np.median([point[i] for point in points])) for i in (3, 4)]
            print(f"{state:10}{name:15}", *cells, *(f"{speed:9.0f}" for speed in speeds))


if __name__ == "__main__":
    main()
