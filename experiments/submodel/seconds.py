"""Times rounds with and without federated dropout, and counts their bytes.

All settings run in turn, in one process with one worker thread, so that a drift of the machine's speed affects all
alike. Times are processor times of the process: medians, and medians of ratios within a turn. Ten clients of mnist5k,
the CNN.

python -m experiments.submodel.seconds [--repeats 7]
"""

import argparse
import statistics
from functools import partial
from time import process_time

import torch
from rich.table import Table

from experiments.tables import show
from fedq.data.mnist5k import Mnist5k
from fedq.encoding import Encoder, FixedWidth, StateDictEncoder, UniformQuantization
from fedq.learning import FederatedAveraging, FederatedDropout, LocalTraining
from fedq.models import FedAvgCNN

ENCODERS = {
    "float32": StateDictEncoder(),
    "uint8": StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth())),
}
PHASES = ("train", "encode", "decode", "aggregate")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    dataset = Mnist5k()
    cohort = [dataset.client(number) for number in range(10)]
    settings = [(encoder, keep) for encoder in ENCODERS for keep in (None, 1.0, 0.75, 0.5)]
    processes = {
        (name, keep): FederatedAveraging(
            partial(FedAvgCNN, 10),
            LocalTraining(lr=0.1),
            partial(torch.optim.SGD, lr=1.0),
            ENCODERS[name],
            ENCODERS[name],
            submodel=FederatedDropout(keep) if keep else None,
        )
        for name, keep in settings
    }
    states = {setting: process.initialize() for setting, process in processes.items()}
    bits: dict[tuple[str, float | None], tuple[float, float]] = {}
    seconds: dict[tuple[str, float | None], list[float]] = {setting: [] for setting in settings}
    phases: dict[tuple[str, float | None], list[list[float]]] = {setting: [] for setting in settings}
    for turn in range(repeats + 1):
        for setting in settings:
            started = process_time()
            states[setting], metrics = processes[setting].next(states[setting], cohort)
            if turn:  # the first turn warms up
                seconds[setting].append(process_time() - started)
                phases[setting].append([metrics[f"seconds/{phase}"] for phase in PHASES])
            bits[setting] = metrics["broadcast_bits"], metrics["aggregated_bits"]

    table = Table("encoder", "keep", "Mibit down", "up", "of the whole", "CPU s", "of the whole", *PHASES)
    for name, keep in settings:
        own, whole = seconds[name, keep], seconds[name, None]
        shares = [sum(column) for column in zip(*phases[name, keep], strict=True)]
        down, up = bits[name, keep]
        table.add_row(
            name,
            str(keep or "no dropout"),
            f"{down / 2**20:.2f}",
            f"{up / 2**20:.2f}",
            f"{up / bits[name, None][1]:.3f}",
            f"{statistics.median(own):.3f}",
            f"{statistics.median(a / b for a, b in zip(own, whole, strict=True)):.2f}",
            *(f"{share / sum(shares):.1%}" for share in shares),
        )
    show(table)


if __name__ == "__main__":
    main()
