"""Times a round right after the last one, after a sleep, and after other memory traffic, as among other contestants.

The bare loop, float32 and 8 bits both ways run in turn, in one process, as in experiments/round_time. Prints medians,
and median ratios within a turn.

python -m experiments.peers.idle [--repeats 7]
"""

import argparse
import statistics
from time import perf_counter, sleep

import torch
from rich.table import Table

from experiments.round_time.round_time import (
    CLIENTS,
    EXACT,
    EXAMPLES,
    UINT8,
    WORKERS,
    bare_round,
    fedq_round,
)
from experiments.tables import show
from fedq.data import Examples
from fedq.simulation.workers import Workers

ELEMENTS = 60_000_000  # 240 MB, more than the caches hold


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="number of turns")
    repeats = parser.parse_args().repeats
    draw, large = torch.Generator().manual_seed(0), torch.rand(ELEMENTS)
    data = [
        Examples(torch.rand(EXAMPLES, 1, 28, 28, generator=draw), torch.randint(0, 10, (EXAMPLES,), generator=draw))
        for _ in range(CLIENTS)
    ]
    table = Table(
        "before each round", "bare", "float32", "uint8", "float32 to bare", "uint8 to bare", "uint8 to float32"
    )
    with Workers(WORKERS) as workers:
        bare = bare_round(data)
        exact, uint8 = (fedq_round(way, way, "float32", data, workers)[0] for way in (EXACT, UINT8))
        for name, seconds, reads in (("nothing", 0, 0), ("sleep", 1, 0), ("240 MB read", 0, 1), ("both", 1, 1)):
            turns = []
            for _ in range(repeats + 1):  # the first turn warms up
                turn = []
                for run in (bare, exact, uint8):
                    for _ in range(reads):
                        large.sum()
                    sleep(seconds)
                    started = perf_counter()
                    run()
                    turn.append(perf_counter() - started)
                turns.append(turn)
            of_bare, of_exact, of_uint8 = zip(*turns[1:], strict=True)
            medians = [f"{statistics.median(times):.3f}" for times in (of_bare, of_exact, of_uint8)]
            pairs = ((of_exact, of_bare), (of_uint8, of_bare), (of_uint8, of_exact))
            ratios = [statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs]
            table.add_row(name, *medians, *(f"{ratio:.3f}" for ratio in ratios))
    show(table)


if __name__ == "__main__":
    main()
