"""Evaluates models on examples, with a task's metrics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from fedq.data import Client, Examples
from fedq.errors import FedqError
from fedq.keys import Key
from fedq.learning.aggregation import one_thread
from fedq.learning.draws import KeyedDraws
from fedq.learning.failures import ClientFailure
from fedq.learning.local_training import CLASSIFICATION, Precision, check_nothing_drawn, generators, loaded
from fedq.learning.parts import copied
from fedq.learning.task import (
    Sums,
    Task,
    TaskError,
    check_examples,
    check_fit,
    check_works,
    of,
    outputs_of,
    remedy,
    remedy_of_model,
    summable,
)

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Applies a function to each item and yields the results in order, as Python's `map` or a pool's does."""


def evaluate(
    model: nn.Module,
    examples: Examples,
    batch_size: int = 50,
    map: Map = map,
    precision: Precision = "float32",
    task: Task = CLASSIFICATION,
) -> dict[str, float]:
    """Returns the task's metrics; by default the mean cross entropy and the share of correct predictions.

    model: The model, on any device; evaluation mode stays on.
    examples: At least one example.
    batch_size: The number of examples in a forward pass.
    map: Evaluates the batches; a pool's `map` evaluates them side by side, with the same result.
    precision: The precision of forward passes.
    task: Gives the loss and the sums. Sums are integers or float64, added in the order of the batches.

    Raises FedqError without examples or targets that count, and if the model draws random numbers without torch. Raises
    TaskError if the examples or the model's outputs do not fit the task.
    """

    def batch(start: int, keyed: bool = False) -> Sums:
        # a copy: a model may write to its input
        x, y = (part[start : start + batch_size].to(device, copy=True) for part in examples)
        draws = KeyedDraws(Key(0, start).fold("evaluate"), device) if keyed else nullcontext()
        with draws, torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = outputs_of(model(x))
            if not start:
                check_fit(task, outputs, len(y), examples.y)
            sums = {"loss": task.loss(outputs, y, "sum"), **task.test_sums(outputs, y)}
            return {"targets": task.count(y)} | {name: summable(value) for name, value in sums.items()}

    examples = check_examples(examples)
    if not len(examples.y):
        raise FedqError("there are no examples to evaluate on: the dataset's test set is empty")
    device = next(model.parameters()).device
    model.eval()
    before, starts = generators(device), range(0, len(examples.y), batch_size)
    first, *others = map(batch, starts)
    if any(before[name] != value for name, value in generators(device).items() if name.startswith("torch")):
        # the model draws, which is rare: repeated, with draws that depend only on the batch's place
        first, *others = map(partial(batch, keyed=True), starts)
    check_nothing_drawn({name: value for name, value in before.items() if not name.startswith("torch")}, device)
    total = dict(first)
    for sums in others:
        total = {name: value + sums[name] for name, value in total.items()}
    if not total["targets"]:
        raise FedqError("no target of the test set counts")
    return task.metrics(total)


@one_thread()
def check(model: nn.Module, whose: str, examples: Examples, task: Task) -> None:
    """Raises TaskError unless the model takes the examples, and the task takes the outputs and the targets.

    model: The model.
    whose: The owner of the examples, for the error's text.
    examples: The model evaluates the first two; the targets of all are checked. An empty set passes.
    task: The task.

    Changes neither the model, nor the examples, nor torch's generator.
    """
    device = next(model.parameters()).device
    try:
        examples = check_examples(examples)
        if not len(examples.y):
            return
        x = examples.x[:2].to(device, copy=True)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            try:
                returned = copied(model).eval()(x)
            except Exception as error:  # an author's model may raise any error
                reason = str(error).splitlines()[0] if str(error) else ""
                raise TaskError(
                    f"the model fails on inputs {of(x)}: {type(error).__name__}: {reason}{remedy_of_model(x)}"
                    f"{remedy(task, examples.y)}"
                ) from error
            outputs, y = outputs_of(returned), examples.y[:2].to(device)
            if outputs.isnan().any() and not examples.x.isfinite().all():
                raise TaskError("the inputs hold NaN or infinity, and the model returns NaN")
            check_fit(task, outputs, len(x), examples.y)
            check_works(task, outputs, y)
    except TaskError as error:
        raise TaskError(f"with the examples of {whose}: {error}") from error


def evaluate_personal(
    model_of: Callable[[int], nn.Module],
    clients: Iterable[tuple[int, Examples]],
    batch_size: int,
    map: Map,
    precision: Precision,
    task: Task,
) -> dict[str, float]:
    """Returns each metric's mean over the clients that have the metric; empty if no client has a target that counts.

    model_of: Returns a new model for a client's number.
    clients: The numbers and examples of clients.

    The other arguments are those of `evaluate`.
    """
    metrics = [
        evaluate(model_of(number), examples, batch_size, map, precision, task)
        for number, examples in clients
        if task.count(check_examples(examples).y)
    ]
    names = {name: None for one in metrics for name in one}
    return {name: fmean(one[name] for one in metrics if name in one) for name in names}


def evaluate_clients(
    model_of: Callable[[int], nn.Module],
    clients: Iterable[Client],
    batch_size: int,
    map: Map,
    precision: Precision,
    task: Task,
) -> dict[str, float]:
    """Returns mean, median and worst tenth of the headline over clients; each client counts once, as in Li 2020.

    A client is evaluated on its test examples. Without test examples, its validation examples are used, and without
    these its training examples. Clients without a target that counts, and clients that cannot be read, are left
    out. The worst tenth is rounded up to whole clients.

    model_of: Returns a new model for a client's number.
    map: Evaluates the clients; a pool's `map` evaluates them side by side, with the same result.

    The other arguments are those of `evaluate`. Raises FedqError if no client is left.
    """

    def headline(client: Client) -> list[float]:
        try:
            examples = loaded(client.number, client.test or client.validation or client.load)
        except ClientFailure:
            return []
        if not task.count(examples.y):
            return []
        metrics = evaluate(model_of(client.number), examples, batch_size, precision=precision, task=task)
        return [metrics[task.headline]]

    values = [value for found in map(headline, clients) for value in found]
    if not values:
        raise FedqError("run.evaluate_clients: these clients have no examples to evaluate")
    worst_first = sorted(values, reverse=not task.more_is_better)
    return {
        f"{task.headline}_mean": fmean(values),
        f"{task.headline}_median": median(values),
        f"{task.headline}_worst_tenth": fmean(worst_first[: -(-len(values) // 10)]),
    }
