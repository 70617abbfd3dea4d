"""Loss and accuracy of a model on examples."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedq.data import Examples
from fedq.errors import FedqError
from fedq.learning.local_training import Precision, wide

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Applies a function to each item and yields the results in order, as Python's `map` or a pool's does."""


def evaluate(
    model: nn.Module, examples: Examples, batch_size: int = 50, map: Map = map, precision: Precision = "float32"
) -> dict[str, float]:
    """Returns the mean cross entropy ("loss", in nats) and the share of right classes ("accuracy", 0 to 1).

    model: The model, on any device; evaluation mode stays on.
    examples: At least one example.
    batch_size: The number of examples in a forward pass.
    map: Evaluates the batches; a pool's `map` evaluates them side by side, with the same result.
    precision: The precision of forward passes.

    Raises FedqError if there are no examples.
    """

    def batch(start: int) -> tuple[float, int]:
        # a copy: a model may write to its input
        x, y = (part[start : start + batch_size].to(device, copy=True) for part in examples)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = wide(model(x))
            return float(F.cross_entropy(logits, y, reduction="sum")), int((logits.argmax(1) == y).sum())

    if not len(examples.y):
        raise FedqError("there are no examples to evaluate on: the dataset's test set is empty")
    device = next(model.parameters()).device
    model.eval()
    sums = list(map(batch, range(0, len(examples.y), batch_size)))
    n = len(examples.y)
    return {"loss": sum(loss for loss, _ in sums) / n, "accuracy": sum(correct for _, correct in sums) / n}
