"""Measures the cost of a run against its cohort and its population, and extrapolates to many machines.

Each point is a training in a process of its own, with 8-bit messages both ways:
- start-up: time from the start of the process until its first round begins, by the clock of the parent process;
- seconds a client: wall time of a round without evaluation, by its clients; median of the rounds after the first.
  The processor time of the same rounds, of all threads, hardly depends on other work on the machine;
- peak memory: largest resident set of the process, with evaluation and checkpoints.
The script also measures, without training, the cost of drawing a large cohort, and the bytes that ranks send each
other.

python -m experiments.scaling.scaling [--output experiments/scaling/scaling.png]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import NamedTuple, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from experiments.tables import show

COHORTS = {10: 8, 100: 3, 1000: 2}  # clients a round: rounds
POPULATION = 10**6
POPULATIONS = (10**3, 10**5, POPULATION, 10**8)
COHORT = 10
SUM = 4 * 1_663_370  # bytes of a sum of updates
MACHINES, CLIENTS_A_MACHINE, LINK = (1, 10, 100), 1000, 10e9 / 8  # the link: bytes a second

T = TypeVar("T")


class Point(NamedTuple):
    """The measurements of one training, in seconds and MB."""

    population: int
    cohort: int
    start: float
    client: float
    cpu: float  # processor time a client
    decode: float  # share of `client`
    memory: float


def processor_time(pid: int) -> float:
    """Returns the processor seconds of a process, with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(population: int, cohort: int) -> Point:
    """Trains in a new process and returns the measurements."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedq.train", "dataset=writers", f"dataset.clients={population}"]
        command += ["model=fedavg_cnn", "encoder=uint8", f"run.clients_per_round={cohort}"]
        command += [f"run.rounds={COHORTS[cohort]}", "run.evaluate_every=1000", f"hydra.run.dir={folder}"]
        path, begun, pid = Path(folder) / "metrics.jsonl", perf_counter(), 0
        ends: list[tuple[float, float]] = []  # wall time and processor time of each round
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not pid:
                sleep(0.01)
                if path.exists() and path.read_text().count("\n") > len(ends):
                    ends.append((perf_counter() - begun, processor_time(process.pid)))
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed")
        metrics = [json.loads(line) for line in path.read_text().splitlines()]
    return Point(
        population,
        cohort,
        start=ends[0][0] - metrics[0]["seconds"],
        client=median((m["seconds"] - m["seconds/evaluate"]) / cohort for m in metrics[1:]),
        cpu=median((after - before) / cohort for (_, before), (_, after) in pairwise(ends)),
        decode=median(m["seconds/decode"] / m["seconds"] for m in metrics[1:]),
        memory=usage.ru_maxrss * 1024 / 1e6,
    )


def cost(work: Callable[[], T]) -> tuple[float, float]:
    """Returns the seconds and the peak MB of `work`, without torch's memory."""
    started = perf_counter()
    work()
    seconds = perf_counter() - started
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak / 1e6


def records(numbers: list[int]) -> str:
    """Writes, reads and returns the JSON text of clients' records, which ranks send together with sums."""
    from fedq.learning.round import ClientRecord

    text = json.dumps({number: asdict(ClientRecord(number, norm=0.123456789012)) for number in numbers})
    json.loads(text)
    return text


def sent(cohort: int, ranks: int) -> list[int]:
    """Returns the largest number of partial sums that one rank sends another, for each step of joining ranks."""
    from fedq.learning.aggregation import PairwiseTree
    from fedq.simulation.ranks import split

    bounds = split(np.random.default_rng(0).integers(75, 126, cohort).tolist(), ranks)
    trees = [PairwiseTree[int](max) for _ in range(ranks)]
    for rank, tree in enumerate(trees):
        for place in range(bounds[rank], bounds[rank + 1]):
            tree.add(place, 0)
    most, step = [], 1
    while step < ranks:
        most.append(0)
        for rank in range(step, ranks, 2 * step):
            parts = trees[rank].partial_results()
            most[-1] = max(most[-1], len(parts))
            for level, place, value in parts:
                trees[rank - step].add(place, value, level)
        step *= 2
    return most


def extrapolated(client: float) -> Table:
    """Returns a table of one round on many machines, by calculation; `client`: seconds a client on one machine."""
    # torch is imported after the trainings: a new process inherits the peak memory of its parent
    from fedq.data.writers import Writers
    from fedq.simulation.loop import cohort

    dataset, table = Writers(POPULATIONS[-1]), Table("")
    columns: list[list[str]] = []
    for machines in MACHINES:
        size = machines * CLIENTS_A_MACHINE
        drawing = cost(partial(cohort, 0, 0, dataset.num_clients, size))
        numbers = cohort(0, 0, dataset.num_clients, size).tolist()
        making = cost(partial(lambda numbers: [dataset.client(number) for number in numbers], numbers))
        sums = sent(size, machines)
        table.add_column(f"{machines} × {CLIENTS_A_MACHINE:,} of {dataset.num_clients:,}")
        columns.append(
            [
                f"{client * CLIENTS_A_MACHINE:.1f} s",
                "{:.4f} s, {:.1f} MB".format(*drawing),
                "{:.2f} s, {:.1f} MB".format(*making),
                " ".join(map(str, sums)),
                f"{sum(sums) * SUM / 1e6:.0f} MB, {sum(sums) * SUM / LINK:.2f} s",
                f"{len(records(numbers)) / 1e6:.1f} MB, {cost(partial(records, numbers))[0]:.2f} s",
            ]
        )
    names = "training|drawing the cohort|making its clients|partial sums, a step|their way to rank 0|clients' records"
    for name, *cells in zip(names.split("|"), *columns, strict=True):
        table.add_row(name, *cells)
    return table


def draw(points: list[Point], output: Path) -> None:
    """Draws time and memory against cohort and population."""
    figure = Figure(figsize=(9, 8), dpi=150, layout="constrained")
    grid = figure.subplots(3, 2, sharex="col", sharey="row")
    reference = points[0]
    goals = (10.0, 1150 * reference.cpu, reference.memory + 300)
    sides = (
        ("cohort", f"clients a round, of {POPULATION:,}", [p for p in points if p.population == POPULATION]),
        ("population", f"population, {COHORT} clients a round", [p for p in points if p.cohort == COHORT]),
    )
    for column, (key, label, chosen) in enumerate(sides):
        chosen.sort(key=lambda point: (point.population, point.cohort))
        x = [getattr(point, key) for point in chosen]
        for row, values in enumerate(
            ([p.start for p in chosen], [1000 * p.cpu for p in chosen], [p.memory for p in chosen])
        ):
            axes: Axes = grid[row, column]
            axes.semilogx(x, values, "o-", label="processor time" if row == 1 else None)
            axes.axhline(goals[row], color="grey", linestyle="--", linewidth=1)
            if row == 1:
                axes.axhline(850 * reference.cpu, color="grey", linestyle="--", linewidth=1)
                axes.semilogx(x, [1000 * p.client for p in chosen], "x:", color="C1", label="wall time")
                axes.legend(loc="lower right")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        grid[2, column].set_xlabel(label)
    for axes, name in zip(grid[:, 0], ("start-up, s", "time a client, ms", "peak memory, MB"), strict=True):
        axes.set_ylabel(name)
    figure.suptitle("Dashed: the goals", fontsize=10)
    figure.savefig(output)


def main() -> None:
    """Prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, metavar="PICTURE.png")
    output = parser.parse_args().output
    points = []
    pairs = [(POPULATION, cohort) for cohort in COHORTS]
    pairs += [(population, COHORT) for population in POPULATIONS if population != POPULATION]
    table = Table(
        "population", "clients a round", "start-up, s", "ms a client", "CPU ms", "CPU to 10", "peak, MB", "to 10"
    )
    for pair in pairs:
        point = measure(*pair)
        points.append(point)
        table.add_row(
            f"{point.population:,}",
            f"{point.cohort:,}",
            f"{point.start:.2f}",
            f"{1000 * point.client:.1f}",
            f"{1000 * point.cpu:.1f}",
            f"{point.cpu / points[0].cpu:.2f}",
            f"{point.memory:.0f}",
            f"{point.memory - points[0].memory:+.0f}",
        )
    show(table)
    largest = max(points, key=lambda point: point.cohort)
    print(f"decoding takes {largest.decode:.1%} of the time of a client, of {largest.cohort:,} a round")
    if output:
        draw(points, output)
    show(extrapolated(largest.cpu / len(os.sched_getaffinity(0))))


if __name__ == "__main__":
    main()
