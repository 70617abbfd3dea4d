"""The work, its check and the protocol of all contestants. Needs only torch and fedq.models."""

import json
import math
import os
import sys
from collections.abc import Iterable
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedq.models import FedAvgCNN

CLIENTS, EXAMPLES, BATCH, WORKERS, RATE = 10, 100, 20, 2, 0.02
STEPS = CLIENTS * EXAMPLES // BATCH


def make_data() -> list[tuple[Tensor, Tensor]]:
    """Returns each client's images, float32 (100, 1, 28, 28), and classes, int64 (100,)."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(EXAMPLES, 1, 28, 28, generator=generator), torch.arange(EXAMPLES) % 10) for _ in range(CLIENTS)]


def make_model() -> FedAvgCNN:
    """Returns the model in channels_last, which is faster for all contestants."""
    return FedAvgCNN(10).to(memory_format=torch.channels_last)


def train(model: nn.Module, x: Tensor, y: Tensor) -> tuple[int, float]:
    """Trains in place for one epoch in random order; returns the number of steps and the last loss."""
    order = torch.randperm(EXAMPLES)
    x, y = x[order], y[order]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps, loss = 0, torch.zeros(())
    for start in range(0, EXAMPLES, BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH])
        torch.autograd.backward(loss)
        optimizer.step()
        steps += 1
    return steps, float(loss.detach())


class Rounds:
    """The contestant's side of the protocol: reads a line for each round, and answers its seconds in JSON.

    From then on, the output of libraries goes to standard error.
    """

    def __init__(self, version: str) -> None:
        self._version = version
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._weights: Tensor | None = None
        self._started = 0.0

    def boundary(self, weights: Iterable[Tensor], steps: int = 0, loss: float = math.nan) -> bool:
        """Ends a round, checks and reports it, and waits; returns whether another round follows.

        Call it before the first round too. Raises RuntimeError if the round did not do its work.

        Args:
            weights: the server's weights.
            steps: number of local steps of the round.
            loss: last loss of the round.
        """
        seconds = perf_counter() - self._started
        after = torch.cat([value.detach().flatten().clone() for value in weights])
        if self._weights is None:
            self._answer(self._version)
        else:
            moved = float((after - self._weights).abs().mean())
            if not (steps == STEPS and math.isfinite(loss) and math.isfinite(moved) and moved > 0):
                raise RuntimeError(f"not a round: {steps} steps instead of {STEPS}, loss {loss}, weights moved {moved}")
            self._answer(seconds)
        self._weights = after
        more = bool(sys.stdin.readline())
        self._started = perf_counter()
        return more

    def _answer(self, value: str | float) -> None:
        print(json.dumps(value), file=self._answers, flush=True)
