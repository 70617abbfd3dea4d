"""Times rounds of the LSTM, the transformer and ResNet-20 against the same local SGD in bare PyTorch.

Ten clients have 40 random examples each: 80 characters in batches of 4, or colour images of 32 × 32 pixels in batches
of 20. For each model the bare loop, float32 and 8 bits both ways run in turn, in one process. Two worker threads have
one intra-op thread each. The bare loop only trains: no messages, no average, no accuracy. Prints
medians, median ratios within a turn, and the time of each phase.

python -m experiments.tasks.round [MODEL …] [--repeats 9]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from experiments.round_time.round_time import EXACT, UINT8, WORKERS, side_by_side
from experiments.tables import show
from fedq.data import Client, Examples
from fedq.learning import Classification, FederatedAveraging, LocalTraining, NextToken, Task
from fedq.models import CharLSTM, ResNet, Transformer
from fedq.simulation.workers import Workers

CLIENTS, EXAMPLES, LENGTH, CHARACTERS, CLASSES, RATE = 10, 40, 80, 90, 10, 0.02


class Work(NamedTuple):
    """The work of one model's clients in a round."""

    model: Callable[[], nn.Module]
    task: Task
    batch: int


WORK = {
    "char_lstm": Work(partial(CharLSTM, CHARACTERS), NextToken(), 4),
    "transformer": Work(partial(Transformer, CHARACTERS), NextToken(), 4),
    "resnet20": Work(partial(ResNet, CLASSES, norm="group"), Classification(), 20),
}


def examples(task: Task, seed: int) -> Examples:
    """Returns a client's random examples."""
    draw = torch.Generator().manual_seed(seed)
    if isinstance(task, NextToken):
        tokens = torch.randint(1, CHARACTERS, (EXAMPLES, LENGTH + 1), generator=draw)
        return Examples(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    images = torch.rand(EXAMPLES, 3, 32, 32, generator=draw)
    return Examples(images, torch.randint(0, CLASSES, (EXAMPLES,), generator=draw))


def bare_round(work: Work, data: list[Examples]) -> Callable[[], None]:
    """Returns a function that trains every client from the same weights, by local SGD only."""
    # the faster memory layout, which fedq uses too
    models: list[nn.Module] = [work.model().to(memory_format=torch.channels_last) for _ in range(WORKERS)]
    weights = {name: value.clone() for name, value in models[0].state_dict().items()}

    def train(i: int) -> None:
        for client in data[i::WORKERS]:
            models[i].load_state_dict(weights)
            order = torch.randperm(EXAMPLES)
            x, y = client.x[order], client.y[order]
            optimizer = torch.optim.SGD(models[i].parameters(), lr=RATE)
            for start in range(0, EXAMPLES, work.batch):
                optimizer.zero_grad()
                logits = models[i](x[start : start + work.batch])
                loss = F.cross_entropy(logits.flatten(0, -2), y[start : start + work.batch].flatten())
                torch.autograd.backward(loss)
                optimizer.step()

    return partial(side_by_side, train)


def fedq_rounds(work: Work, data: list[Examples], workers: Workers) -> dict[str, Callable[[], dict[str, float]]]:
    """Returns functions that run the second round with float32 and with 8 bits, and return the round's metrics."""
    clients = [Client(i, partial(data.__getitem__, i), EXAMPLES) for i in range(CLIENTS)]
    training, server = LocalTraining(lr=RATE, batch_size=work.batch), partial(torch.optim.SGD, lr=1.0)

    def second_round(process: FederatedAveraging) -> Callable[[], dict[str, float]]:
        state, _ = process.next(process.initialize(), clients)
        return lambda: process.next(state, clients)[1]

    return {
        name: second_round(
            FederatedAveraging(work.model, training, server, encoder, encoder, task=work.task, map=workers.map)
        )
        for name, encoder in (("float32", EXACT), ("uint8", UINT8))
    }


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(WORK)}; default: all")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - WORK.keys():
        parser.error(f"{min(unknown)} is not one of {', '.join(WORK)}")
    table = Table("", "", "seconds", "to bare", "train", "encode", "decode", "aggregate")
    for model in arguments.models or WORK:
        work = WORK[model]
        data = [examples(work.task, seed) for seed in range(CLIENTS)]
        with Workers(WORKERS) as workers:
            rounds = {"bare PyTorch": bare_round(work, data), **fedq_rounds(work, data, workers)}
            seconds: dict[str, list[float]] = {name: [] for name in rounds}
            phases: dict[str, list[dict[str, float]]] = {name: [] for name in rounds}
            for repeat in range(arguments.repeats + 1):
                for name, round_ in rounds.items():
                    started = perf_counter()
                    metrics = round_()
                    if repeat:  # the first turn warms up
                        seconds[name].append(perf_counter() - started)
                        phases[name].append(metrics or {})
        for name, values in seconds.items():
            table.add_row(
                model if name == "bare PyTorch" else "",
                name,
                f"{statistics.median(values):.3f}",
                f"{statistics.median(a / b for a, b in zip(values, seconds['bare PyTorch'], strict=True)):.3f}",
                *(
                    f"{statistics.median(p[f'seconds/{phase}'] for p in phases[name]) * 1000:.0f} ms"
                    for phase in ("train", "encode", "decode", "aggregate")
                    if phases[name][0]
                ),
            )
    show(table)


if __name__ == "__main__":
    main()
