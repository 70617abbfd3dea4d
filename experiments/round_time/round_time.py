"""Times rounds of federated averaging against the same local SGD in bare PyTorch, and both against the machine's peak.

All run in turn, in one process, so that a drift of the machine's speed affects all alike. Each worker thread has one
intra-op thread. A turn has:
- products of two 1024 × 1024 matrices, in as many threads as there are workers: the machine's peak;
- the bare loop: every client trains from the same weights, over its examples in random order, without fedq, messages or
  averaging;
- rounds: float32; uint8 both ways; drive (8 bits down; a rotation and one bit up) with a rotation for each client and
  with one for all; frontier (singular vectors and arithmetic coding); float32 computed in bfloat16;
- an evaluation of 1,000 examples.
Prints medians, median ratios within a turn, and the time of each phase. A round takes 24.5 MFLOP an example forward,
and three times as much with backward. At the end a new process starts: `start` is the time until its first round
begins.

python -m experiments.round_time.round_time [--repeats 15] [--compile]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from experiments.tables import show
from fedq.data import Client, Examples
from fedq.encoding import (
    CABAC,
    Eden,
    Encoder,
    FixedWidth,
    HadamardRotation,
    SingularVectors,
    StateDictEncoder,
    StepQuantization,
    UniformQuantization,
)
from fedq.learning import FederatedAveraging, LocalTraining
from fedq.learning.local_training import Precision
from fedq.models import FedAvgCNN
from fedq.simulation.workers import Workers

CLIENTS, EXAMPLES, BATCH, WORKERS, RATE = 10, 100, 20, 2, 0.02
SIDE, PRODUCTS = 1024, 8  # side of the matrices; products a thread
FORWARD = 24.5e6  # floating-point operations an example
EXACT = StateDictEncoder()
UINT8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()))
DRIVE, SHARED = (
    StateDictEncoder(Encoder([HadamardRotation(4096, shared=shared), Eden(1, 4096)], FixedWidth()))
    for shared in (False, True)
)

FRONTIER = Encoder(
    [SingularVectors(2.0, 32, 0.1), StepQuantization(2.0, False, centroids=True, rate_weight=0.1)], CABAC()
)
DOWN, UP = (StateDictEncoder(FRONTIER, 0, reference=reference, common_scale=True) for reference in ("initial", "none"))


def side_by_side(work: Callable[[int], None]) -> None:
    """Runs `work` in WORKERS threads of one intra-op thread each; `work` takes the number of its thread."""

    def one(i: int) -> None:
        torch.set_num_threads(1)
        work(i)

    threads = [Thread(target=one, args=(i,)) for i in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def products() -> Callable[[], None]:
    """Returns a function that multiplies matrices into memory that exists already."""
    matrices = [[torch.rand(SIDE, SIDE) for _ in range(3)] for _ in range(WORKERS)]

    def work(i: int) -> None:
        left, right, out = matrices[i]
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)

    return partial(side_by_side, work)


def bare_round(data: list[Examples], compiled: bool = False) -> Callable[[], None]:
    """Returns a function that trains every client from the same weights, by local SGD only."""
    # the faster memory layout, which fedq uses too
    models: list[nn.Module] = [FedAvgCNN(10).to(memory_format=torch.channels_last) for _ in range(WORKERS)]
    weights = {name: value.clone() for name, value in models[0].state_dict().items()}
    forwards = [torch.compile(model) if compiled else model for model in models]

    def work(i: int) -> None:
        for client in data[i::WORKERS]:
            models[i].load_state_dict(weights)
            order = torch.randperm(EXAMPLES)
            x, y = client.x[order], client.y[order]
            optimizer = torch.optim.SGD(models[i].parameters(), lr=RATE)
            for start in range(0, EXAMPLES, BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(forwards[i](x[start : start + BATCH]), y[start : start + BATCH])
                torch.autograd.backward(loss)
                optimizer.step()

    if compiled:
        work(0)  # torch.compile works in one thread at a time
    return partial(side_by_side, work)


def fedq_round(
    broadcast: StateDictEncoder, upload: StateDictEncoder, precision: Precision, data: list[Examples], workers: Workers
) -> tuple[Callable[[], dict[str, float]], Callable[[], dict[str, float]]]:
    """Returns two functions: one runs the second round and returns its metrics, one evaluates."""
    process = FederatedAveraging(
        partial(FedAvgCNN, 10),
        LocalTraining(lr=RATE, batch_size=BATCH),
        partial(torch.optim.SGD, lr=1.0),
        broadcast,
        upload,
        map=workers.map,
        precision=precision,
    )

    def load(i: int) -> Examples:
        return data[i]

    clients = [Client(i, partial(load, i)) for i in range(CLIENTS)]
    state, _ = process.next(process.initialize(), clients)  # the first broadcast of a difference is empty
    test = Examples(torch.cat([part.x for part in data]), torch.cat([part.y for part in data]))
    return lambda: process.next(state, clients)[1], lambda: process.evaluate(state, test)


def start() -> tuple[float, float]:
    """Starts a training of one round; returns the seconds until the round begins, and the seconds of the round."""
    with tempfile.TemporaryDirectory() as folder:
        path, begun = Path(folder) / "metrics.jsonl", perf_counter()
        command = [sys.executable, "-m", "fedq.train", "run.rounds=1", f"hydra.run.dir={folder}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not (path.exists() and path.read_text().endswith("\n")):
                if process.poll():
                    raise RuntimeError(f"{' '.join(command)} failed")
                sleep(0.005)
            done = perf_counter() - begun
            seconds = json.loads(path.read_text())["seconds"]
        return done - seconds, seconds


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also time the bare loop under torch.compile")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    data = [
        Examples(torch.rand(EXAMPLES, 1, 28, 28, generator=generator), torch.arange(EXAMPLES) % 10)
        for _ in range(CLIENTS)
    ]
    with Workers(WORKERS) as workers:
        exact, evaluation = fedq_round(EXACT, EXACT, "float32", data, workers)
        tasks: dict[str, Callable[[], dict[str, float] | None]] = {
            "products": products(),
            "bare PyTorch": bare_round(data),
            "float32": exact,
            "uint8": fedq_round(UINT8, UINT8, "float32", data, workers)[0],
            "drive": fedq_round(UINT8, DRIVE, "float32", data, workers)[0],
            "drive, shared rotation": fedq_round(UINT8, SHARED, "float32", data, workers)[0],
            "frontier": fedq_round(DOWN, UP, "float32", data, workers)[0],
            "float32 in bf16": fedq_round(EXACT, EXACT, "bf16", data, workers)[0],
            "evaluation": evaluation,
        }
        if arguments.compile:
            begun = perf_counter()
            tasks["bare, compiled"] = bare_round(data, compiled=True)
            print(f"torch.compile took {perf_counter() - begun:.1f} s")
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        phases: dict[str, list[dict[str, float]]] = {name: [] for name in tasks}
        for repeat in range(arguments.repeats + 2):
            for name, task in tasks.items():
                started = perf_counter()
                metrics = task()
                if repeat >= 2:  # the first two turns warm up
                    seconds[name].append(perf_counter() - started)
                    phases[name].append(metrics or {})

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    work = {name: 3 * CLIENTS * EXAMPLES * FORWARD for name in tasks}
    work |= {"products": WORKERS * PRODUCTS * 2 * SIDE**3, "evaluation": CLIENTS * EXAMPLES * FORWARD}
    table = Table("", "seconds", "of peak", "to bare", "to float32", "train", "encode", "decode", "aggregate")
    for name, values in seconds.items():
        is_round = name not in ("products", "evaluation")
        table.add_row(
            name,
            f"{statistics.median(values):.3f}",
            f"{work[name] / work['products'] / ratio(name, 'products'):.0%}",
            *(f"{ratio(name, to):.3f}" if is_round else "" for to in ("bare PyTorch", "float32")),
            *(
                f"{statistics.median(p[f'seconds/{phase}'] for p in phases[name]) * 1000:.0f} ms"
                for phase in ("train", "encode", "decode", "aggregate")
                if "seconds/train" in phases[name][0]
            ),
        )
    show(table)
    peak = work["products"] / statistics.median(seconds["products"])
    print(f"peak: {peak / 1e9:.0f} GFLOP/s in float32, {WORKERS} threads")
    starts = [start() for _ in range(3)]
    before, first = (statistics.median(column) for column in zip(*starts, strict=True))
    print(f"start: {before:.1f} s until the first round; that takes {first:.1f} s")


if __name__ == "__main__":
    main()
