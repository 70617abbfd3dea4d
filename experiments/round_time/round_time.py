"""Times a round of federated averaging against the same local SGD in bare PyTorch.

All in one process and alternating, so that a machine whose speed drifts treats all alike: the bare loop (two threads
with one intra-op thread each; every client from the same weights, over its examples in random order; no fedq, no
messages, no averaging), a float32 round, a uint8 round. Prints medians, the median ratio to the row above, and where a
round's time goes.

python -m experiments.round_time.round_time [--repeats 15]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from threading import Thread
from time import perf_counter

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from fedq.data import Client, Examples
from fedq.encoding import Encoder, FixedWidth, StateDictEncoder, UniformQuantization
from fedq.learning import FederatedAveraging, LocalTraining
from fedq.models import FedAvgCNN
from fedq.simulation.workers import Workers

CLIENTS, EXAMPLES, BATCH, WORKERS, RATE = 10, 100, 20, 2, 0.02


def bare_round(models: list[nn.Module], weights: dict[str, torch.Tensor], data: list[Examples]) -> None:
    """Trains every client from the same weights: local SGD and nothing else."""

    def work(model: nn.Module, mine: list[Examples]) -> None:
        torch.set_num_threads(1)
        for client in mine:
            model.load_state_dict(weights)
            order = torch.randperm(EXAMPLES)
            x, y = client.x[order], client.y[order]
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            for start in range(0, EXAMPLES, BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH])
                torch.autograd.backward(loss)
                optimizer.step()

    threads = [Thread(target=work, args=(model, data[i::WORKERS])) for i, model in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fedq_round(encoder: StateDictEncoder, data: list[Examples], workers: Workers) -> Callable[[], dict[str, float]]:
    """Returns a function that runs one round from the initial weights and returns its metrics."""
    process = FederatedAveraging(
        partial(FedAvgCNN, 10),
        LocalTraining(lr=RATE, batch_size=BATCH),
        partial(torch.optim.SGD, lr=1.0),
        encoder,
        encoder,
        map=workers.map,
    )
    state = process.initialize()

    def load(i: int) -> Examples:
        return data[i]

    clients = [Client(i, partial(load, i)) for i in range(CLIENTS)]
    return lambda: process.next(state, clients)[1]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    generator = torch.Generator().manual_seed(0)
    data = [
        Examples(torch.rand(EXAMPLES, 1, 28, 28, generator=generator), torch.arange(EXAMPLES) % 10)
        for _ in range(CLIENTS)
    ]
    uint8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()))
    # the bare loop gets the faster memory layout too
    models: list[nn.Module] = [FedAvgCNN(10).to(memory_format=torch.channels_last) for _ in range(WORKERS)]
    weights = {name: value.clone() for name, value in models[0].state_dict().items()}
    with Workers(WORKERS) as workers:
        rounds: dict[str, Callable[[], dict[str, float] | None]] = {
            "bare PyTorch": lambda: bare_round(models, weights, data),
            "float32": fedq_round(StateDictEncoder(), data, workers),
            "uint8": fedq_round(uint8, data, workers),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rounds}
        phases: dict[str, list[dict[str, float]]] = {name: [] for name in rounds}
        for repeat in range(repeats + 2):
            for name, one_round in rounds.items():
                started = perf_counter()
                metrics = one_round()
                if repeat >= 2:  # the first two warm up
                    seconds[name].append(perf_counter() - started)
                    phases[name].append(metrics or {})
    table = Table("round", "seconds", "ratio to the one above", "train", "encode", "decode", "aggregate")
    above: list[float] | None = None
    for name, values in seconds.items():
        ratio = "" if above is None else f"{statistics.median(a / b for a, b in zip(values, above, strict=True)):.3f}"
        split = [
            f"{statistics.median(p[f'seconds/{phase}'] for p in phases[name]) * 1000:.0f} ms" if phases[name][0] else ""
            for phase in ("train", "encode", "decode", "aggregate")
        ]
        table.add_row(name, f"{statistics.median(values):.3f}", ratio, *split)
        above = values
    Console().print(table)


if __name__ == "__main__":
    main()
