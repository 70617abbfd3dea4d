"""The loop: a cohort, a round, an evaluation, again."""

from collections.abc import Iterator
from time import perf_counter

import numpy as np

from fedq.config import RunConfig
from fedq.data import FederatedDataset
from fedq.encoding import Key
from fedq.learning import FederatedAveraging, ServerState


def cohort(seed: int, round: int, population: int, size: int) -> np.ndarray:
    """Returns the client numbers of a round: `size` of `population` without replacement, in the order drawn."""
    return Key(seed, round).fold("cohort").generator().choice(population, size, replace=False)


def rounds(
    process: FederatedAveraging, state: ServerState, dataset: FederatedDataset, run: RunConfig
) -> Iterator[tuple[ServerState, dict[str, float]]]:
    """Yields the state after each round with its metrics, until `run.rounds` are done.

    The metrics are the process's, the wall time (`seconds`) and, on rounds that evaluate, the test set's.
    """
    test = dataset.test()
    while state.round < run.rounds:
        started = perf_counter()
        numbers = cohort(run.seed, state.round, dataset.num_clients, run.clients_per_round)
        state, metrics = process.next(state, [dataset.client(int(number)) for number in numbers])
        metrics["seconds/evaluate"] = 0.0
        if state.round % run.evaluate_every == 0 or state.round == run.rounds:
            evaluating = perf_counter()
            for name, value in process.evaluate(state, test, run.test_batch_size).items():
                metrics[f"test/{name}"] = value
            metrics["seconds/evaluate"] = perf_counter() - evaluating
        metrics["seconds"] = perf_counter() - started
        yield state, metrics
