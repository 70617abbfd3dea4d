"""Encodes the saved tensors with NNCodec, the software of ISO/IEC 15938-17 (NNC), in an environment of its own.

python -m experiments.nncodec.peer --environments FOLDER [--tensors outputs/tensors.npz]

Makes the environment in FOLDER if it is missing. Each point is a stream of all tensors of a state, which NNCodec
decodes again. Bits are 8 × bytes / parameters. Seconds are of one run with one thread, after a run to warm up. Writes
nncodec.csv and prints bits at round decibels. Without --environments it prints the tables of nncodec.csv.

The modes are `dependent` (trellis-coded) and `uniform` quantisation. Each mode is measured over a grid of steps and of
weights of the rate in the encoder's decisions. `qp` sets the step: 4 more double the step. `lambda_scale` sets the
weight (RDOQ); 0 is NNCodec's default. The best other settings are fixed: rows of zeros are skipped, the encoder chooses
the contexts' parameters, and all tensors have one step. OTHERS are tried at one point a state.
"""

import argparse
import contextlib
import csv
import io
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from experiments.tensors.tensors import STATES, TENSORS, load

HERE = Path(__file__).parent
DENSE = "dense1.weight"
COARSEST = {"round5": -36, "round15": -32, "weights15": -24}  # the qp at which nearly all symbols are 0
RATE_WEIGHTS = {"dependent": (0.0, 0.3, 0.6, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0), "uniform": (0.0, 0.5, 1.0, 2.0, 3.0)}
RANGE = (-2.5, -16)  # dB: from this value for all parameters to this value for the large tensor
TARGETS = (-4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14)  # dB
CHOICES: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("uniform", ("uniform",), True),
    ("uniform RDOQ", ("uniform",), False),
    ("dependent", ("dependent",), True),
    ("best", ("uniform", "dependent"), False),
)
OTHERS: dict[str, dict[str, Any]] = {
    "rows not skipped": {"row_skipping": False},
    "fixed contexts": {"param_opt": False},
    "other tensors fine": {"nonweight_qp": -75},  # NNCodec's default: a step of 2^-19 for biases
    "qp by layer": {"opt_qp": True},
    "two unary bins": {"cabac_unary_length_minus1": 1},
    "blocks of 64": {"scan_order": 4},
    "codebook": {"codebook_mode": 2},
    "transposed": {},
}


@dataclass(frozen=True)
class Point:
    """One stream: bits a parameter, and decibels of ‖x − x̂‖² / ‖x‖², of all tensors and of the large one alone.

    `dense_bits` are the bits of the stream, less the bits of a stream of all other tensors.
    """

    state: str
    mode: str
    qp: int
    lambda_scale: float
    bits: float
    decibels: float
    dense_bits: float
    dense_decibels: float
    encode_seconds: float
    decode_seconds: float
    envelope: bool = False
    dense_envelope: bool = False


def measure(tensors: dict[str, np.ndarray], state: str, mode: str, qp: int, lambda_scale: float) -> Point:
    """Encodes and decodes float32 `tensors`; `mode` is a quantiser and, after a comma, one of OTHERS."""
    from nncodec import nnc

    quantiser, _, other = mode.partition(", ")
    turned = {
        name: np.ascontiguousarray(x.T) if other == "transposed" and x.ndim == 2 else x.copy()
        for name, x in tensors.items()
    }
    options = {"use_dq": quantiser == "dependent", "row_skipping": True, "param_opt": True, "nonweight_qp": qp}
    options |= {"qp": qp, "lambda_scale": lambda_scale} | OTHERS.get(other, {})
    with contextlib.redirect_stdout(io.StringIO()):  # some modes of NNCodec print text
        started = perf_counter()
        stream = nnc.compress(turned, bitstream_path=None, return_bitstream=True, **options)
        encoded = perf_counter()
        received = nnc.decompress(stream)
        decoded = perf_counter()
        del turned[DENSE]
        others = nnc.compress(turned, bitstream_path=None, return_bitstream=True, **options)
    if other == "transposed":
        received = {name: x.T if x.ndim == 2 else x for name, x in received.items()}
    energy = {name: float(np.square(x, dtype=np.float64).sum()) for name, x in tensors.items()}
    error = {name: float(np.square(x - received[name], dtype=np.float64).sum()) for name, x in tensors.items()}
    return Point(
        state,
        mode,
        qp,
        lambda_scale,
        8 * len(stream) / sum(x.size for x in tensors.values()),
        10 * math.log10(sum(error.values()) / sum(energy.values())),
        8 * (len(stream) - len(others)) / tensors[DENSE].size,
        10 * math.log10(error[DENSE] / energy[DENSE]),
        encoded - started,
        decoded - encoded,
    )


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the lower convex hull of (bits, decibels), from few bits to many."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if best and y >= best[-1][1]:
            continue
        while len(best) > 1:
            (x0, y0), (x1, y1) = best[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            best.pop()
        best.append((x, y))
    return best


def grid(tensors: dict[str, np.ndarray], state: str) -> Iterator[Point]:
    """Yields the points of both quantisers within RANGE, and one point of each of OTHERS."""
    nearest = None
    for mode, rate_weights in RATE_WEIGHTS.items():
        for lambda_scale in rate_weights:
            for qp in range(COARSEST[state], COARSEST[state] - 40, -1):
                point = measure(tensors, state, mode, qp, lambda_scale)
                if point.dense_decibels < RANGE[1]:
                    break
                if point.decibels <= RANGE[0]:
                    yield point
                    if lambda_scale == 1 and mode == "dependent":
                        nearest = min(nearest or point, point, key=lambda p: abs(p.decibels + 9))
    assert nearest
    for other in OTHERS:
        qp = nearest.qp - 7 * (other == "qp by layer")  # the setting coarsens the steps of large layers
        yield measure(tensors, state, f"dependent, {other}", qp, nearest.lambda_scale)


def inside(path: Path, out: Path) -> None:
    """Measures all states, in NNCodec's environment."""
    import torch

    torch.set_num_threads(1)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        for state in STATES:
            tensors = load(path, state)
            measure(tensors, state, "dependent", COARSEST[state], 1.0)
            points = list(grid(tensors, state))
            best = hull([(p.bits, p.decibels) for p in points])
            dense_best = hull([(p.dense_bits, p.dense_decibels) for p in points])
            for point in points:
                point = replace(
                    point,
                    envelope=(point.bits, point.decibels) in best,
                    dense_envelope=(point.dense_bits, point.dense_decibels) in dense_best,
                )
                row = {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in asdict(point).items()}
                writer.writerow(row)
            file.flush()


def table(points: list[dict[str, str]], large: bool) -> None:
    """Prints bits at TARGETS, interpolated on the envelope of each choice, of all tensors or of the large one."""
    bits, decibels = ("dense_bits", "dense_decibels") if large else ("bits", "decibels")
    print(f"\n{DENSE if large else 'all parameters':25}", *(f"{target:>6} dB" for target in TARGETS))
    for state in STATES:
        for name, modes, plain in CHOICES:
            chosen = [p for p in points if p["state"] == state and p["mode"] in modes]
            chosen = [p for p in chosen if not plain or float(p["lambda_scale"]) == 0]
            best = hull([(float(p[bits]), float(p[decibels])) for p in chosen])
            x, y = zip(*reversed(best), strict=True)
            cells = (f"{np.interp(target, y, x, left=math.nan, right=math.nan):9.3f}" for target in TARGETS)
            print(f"{state:10}{name:15}", *cells)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environments", type=Path, help="measure; folder of the virtual environments")
    parser.add_argument("--tensors", type=Path, default=TENSORS)
    parser.add_argument("--out", type=Path, default=HERE / "nncodec.csv")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the environment
    options = parser.parse_args()
    if options.inside:
        inside(options.tensors, options.out)
        return
    if options.environments:
        from experiments.peers.peers import environment

        python = environment(options.environments.resolve(), "nncodec", sys.executable, HERE)
        command: list[str | Path] = [python, "-m", "experiments.nncodec.peer", "--inside"]
        command += ["--tensors", options.tensors.resolve(), "--out", options.out.resolve()]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=HERE.parent.parent, env=one_thread)
    with options.out.open() as file:
        points = list(csv.DictReader(file))
    for large in (False, True):
        table(points, large)


if __name__ == "__main__":
    main()
