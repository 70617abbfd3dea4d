"""The loop of a run: draw a cohort, do a round, evaluate, repeat."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from time import perf_counter

import numpy as np

from fedq.config_nodes import RunConfig
from fedq.data import Client, Examples, FederatedDataset
from fedq.data.holdout import drawn, validation_set
from fedq.encoding import Key
from fedq.learning import ClientFailure, FederatedAveraging, Gather, ServerState, TaskError, TooFewClients
from fedq.learning.evaluation import check
from fedq.learning.local_training import loaded

log = logging.getLogger(__name__)

Clients = Callable[[int, Iterable[int]], list[Client]]
"""Returns the clients with the given numbers, as they behave in the round with the given serial number."""

Step = Callable[[ServerState], tuple[ServerState, dict[str, float]]]
"""Returns the state after one more round, and the round's metrics."""


def cohort(seed: int, serial: int, population: int, size: int) -> np.ndarray:
    """Draws the clients of a round without replacement.

    seed: the run's seed.
    serial: the round's serial number.
    population: number of clients of the dataset.
    size: number of clients to draw.

    Returns client numbers (int64, shape (size,)) in the order drawn.
    """
    return Key(seed, serial).fold("cohort").generator().choice(population, size, replace=False)


def rounds(
    process: FederatedAveraging,
    state: ServerState,
    dataset: FederatedDataset,
    run: RunConfig,
    clients: Clients | None = None,
    gather: Gather | None = None,
    stop: Callable[[], bool] = lambda: False,
    step: Step | None = None,
) -> Iterator[tuple[ServerState, dict[str, float]]]:
    """Returns an iterator over the state and the metrics after each round, until `run.rounds` are done.

    The loop adds the wall time (`seconds`) to the metrics. On rounds that evaluate, it adds metrics of the test set, of
    validation examples (`run.validation`) and of single clients (`run.evaluate_clients`). A round in which too few
    clients answer is repeated with another cohort, up to `run.repeats` times in a row. The metrics of the round add up
    bits, uploads, failures and seconds of all its cohorts.

    process: the algorithm.
    state: the state to start from.
    dataset: the clients' examples and the test set.
    run: the group `run` of the configuration.
    clients: returns the clients of a round; None for the dataset's clients.
    gather: as for `FederatedAveraging.next`.
    stop: asked before each round whether the run stops early.
    step: does a round; None draws a cohort and calls `FederatedAveraging.next`.

    Raises TaskError at once unless a client, the test and the validation set fit the model and the task. The iterator
    raises TooFewClients when the repeats are used up.
    """
    if not isinstance(first := dataset.client(0), Client):
        raise TaskError(
            f"dataset: client(0) of {type(dataset).__name__} must return a fedq.data.Client, such as "
            f"Client(0, lambda: examples), not a {type(first).__name__}"
        )
    sets = {"test": dataset.test()}
    if run.validation is not None:
        sets["validation"] = validation_set(dataset, run.seed)
    model, task = process.protocol.model, process.protocol.task
    with suppress(ClientFailure):  # rounds leave out a client that cannot be read
        check(model, "client 0", loaded(0, first.load, process.device), task)
    for name, examples in sets.items():
        check(model, f"the {name} set", examples, task)

    def synchronous(state: ServerState) -> tuple[ServerState, dict[str, float]]:
        numbers = cohort(run.seed, state.attempt, dataset.num_clients, run.cohort_size).tolist()
        chosen = clients(state.attempt, numbers) if clients else [dataset.client(number) for number in numbers]
        return process.next(state, chosen, gather)

    return _rounds(process, state, dataset, sets, run, step or synchronous, stop)


def _rounds(
    process: FederatedAveraging,
    state: ServerState,
    dataset: FederatedDataset,
    sets: dict[str, Examples],
    run: RunConfig,
    step: Step,
    stop: Callable[[], bool],
) -> Iterator[tuple[ServerState, dict[str, float]]]:
    sets = {name: Examples(*(part.to(process.device) for part in examples)) for name, examples in sets.items()}
    while state.round < run.rounds and not stop():
        started, before, repeated = perf_counter(), state, Counter[str]()
        while state.round == before.round:
            try:
                state, metrics = step(state)
            except TooFewClients as error:
                if error.state.repeats - before.repeats > run.repeats:
                    raise
                log.warning("%s; the round is repeated with another cohort", error)
                state = error.state
                repeated.update(error.counts)
        metrics["broadcast_bits"] = state.broadcasted_bits - before.broadcasted_bits
        metrics["aggregated_bits"] = state.aggregated_bits - before.aggregated_bits
        metrics["report_bits"] = state.reported_bits - before.reported_bits
        metrics |= {name: metrics[name] + count for name, count in repeated.items()}
        metrics["repeats"] = state.repeats - before.repeats
        metrics["seconds/evaluate"] = 0.0
        if state.round % run.evaluate_every == 0 or state.round == run.rounds:
            evaluating = perf_counter()
            for name, examples in sets.items():
                of_each = _examples_of_each(_evaluated(dataset, run), name, examples)
                evaluated = process.evaluate(state, examples, run.test_batch_size, of_each)
                metrics |= {f"{name}/{metric}": value for metric, value in evaluated.items()}
            if run.evaluate_clients:
                evaluated = process.evaluate_clients(state, _evaluated(dataset, run), run.test_batch_size)
                metrics |= {f"per_client/{metric}": value for metric, value in evaluated.items()}
            metrics["seconds/evaluate"] = perf_counter() - evaluating
        metrics["seconds"] = perf_counter() - started
        yield state, metrics


def _evaluated(dataset: FederatedDataset, run: RunConfig) -> Iterator[Client]:
    """Yields the clients of an evaluation: all, or as many as `run.evaluate_clients` says."""
    limit = run.evaluate_clients
    size = limit if isinstance(limit, int) else dataset.num_clients
    yield from map(dataset.client, drawn(run.seed, "evaluated clients", dataset.num_clients, size))


def _examples_of_each(clients: Iterable[Client], name: str, examples: Examples) -> Iterator[tuple[int, Examples]]:
    """Yields each client's number and "test" or "validation" examples; for clients without them, `examples`.

    Clients that cannot be read are left out.
    """
    for client in clients:
        try:
            its = loaded(client.number, getattr(client, name) or (lambda: examples))
        except ClientFailure:
            continue
        yield client.number, its
