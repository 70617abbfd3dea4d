"""fedq's rounds, float32 or with 8-bit messages both ways, and the bare PyTorch loop."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from experiments.peers.contestant import BATCH, CLIENTS, RATE, WORKERS, Rounds, make_data, make_model, train
from fedq.data import Client, Examples
from fedq.encoding import Encoder, FixedWidth, StateDictEncoder, UniformQuantization
from fedq.learning import FederatedAveraging, LocalTraining
from fedq.models import FedAvgCNN
from fedq.simulation.workers import Workers


def counted(logits: list[Tensor]) -> FedAvgCNN:
    """Returns a model that appends to `logits` at every step, from any thread."""
    model = make_model()
    model.register_forward_hook(lambda module, images, output: logits.append(output.detach()))
    return model


def bare(data: list[tuple[Tensor, Tensor]]) -> None:
    """Runs local SGD of all clients in two threads, always from the same weights, without averaging."""
    rounds = Rounds(f"torch {version('torch')}")
    models = [make_model() for _ in range(WORKERS)]
    weights = {name: value.clone() for name, value in models[0].state_dict().items()}

    def work(i: int) -> list[tuple[int, float]]:
        torch.set_num_threads(1)
        done = []
        for x, y in data[i::WORKERS]:
            models[i].load_state_dict(weights)
            done.append(train(models[i], x, y))
        return done

    more = rounds.boundary(models[0].parameters())
    while more:
        with ThreadPoolExecutor(WORKERS) as threads:
            done = [client for clients in threads.map(work, range(WORKERS)) for client in clients]
        steps, losses = zip(*done, strict=True)
        more = rounds.boundary(models[0].parameters(), sum(steps), sum(losses) / CLIENTS)


def fedq(data: list[tuple[Tensor, Tensor]], encoder: StateDictEncoder) -> None:
    """Runs rounds of federated averaging, with real messages of `encoder` both ways."""
    rounds = Rounds(f"torch {version('torch')}")
    logits: list[Tensor] = []
    with Workers(WORKERS) as workers:
        process = FederatedAveraging(
            partial(counted, logits),
            LocalTraining(lr=RATE, batch_size=BATCH),
            partial(torch.optim.SGD, lr=1.0),
            encoder,
            encoder,
            map=workers.map,
        )
        state = process.initialize()
        clients = [Client(i, partial(Examples, x, y)) for i, (x, y) in enumerate(data)]
        more = rounds.boundary(state.weights.values())
        while more:
            logits.clear()
            state, metrics = process.next(state, clients)
            more = rounds.boundary(state.weights.values(), len(logits), metrics["train/loss"])


def main() -> None:
    """Runs the contestant named on the command line."""
    data = make_data()
    match sys.argv[1]:
        case "bare PyTorch":
            bare(data)
        case "fedq float32":
            fedq(data, StateDictEncoder())
        case "fedq uint8":
            fedq(data, StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth())))
