"""The loop: a cohort, a round, an evaluation, again."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

import numpy as np

from fedq.config import RunConfig
from fedq.data import Client, Examples, FederatedDataset
from fedq.encoding import Key
from fedq.learning import FederatedAveraging, Gather, ServerState, TooFewClients

log = logging.getLogger(__name__)

Clients = Callable[[int, Iterable[int]], list[Client]]
"""From a round's serial number and clients' numbers to those clients as they are in that round."""


def cohort(seed: int, serial: int, population: int, size: int) -> np.ndarray:
    """Returns the client numbers of a round: `size` of `population` without replacement, in the order drawn."""
    return Key(seed, serial).fold("cohort").generator().choice(population, size, replace=False)


def rounds(
    process: FederatedAveraging,
    state: ServerState,
    dataset: FederatedDataset,
    run: RunConfig,
    clients: Clients | None = None,
    gather: Gather | None = None,
) -> Iterator[tuple[ServerState, dict[str, float]]]:
    """Yields the state after each round with its metrics, until `run.rounds` are done.

    The metrics are the process's, the wall time (`seconds`) and, on rounds that evaluate, the test set's. A round of
    which too few clients answer is repeated with another cohort up to `run.repeats` times in a row, then TooFewClients
    is raised; the bits, uploads, failures and seconds of all its cohorts are the round's. `clients` gives a round's;
    without it they are the dataset's. `gather` is as for `FederatedAveraging.next`.
    """
    test = Examples(*(part.to(process.device) for part in dataset.test()))
    while state.round < run.rounds:
        started, before, in_vain = perf_counter(), state, Counter[str]()
        while state.round == before.round:
            numbers = cohort(run.seed, state.serial, dataset.num_clients, run.clients_per_round).tolist()
            chosen = clients(state.serial, numbers) if clients else [dataset.client(number) for number in numbers]
            try:
                state, metrics = process.next(state, chosen, gather)
            except TooFewClients as error:
                if error.state.repeats - before.repeats > run.repeats:
                    raise
                log.warning("%s; the round is repeated with another cohort", error)
                state = error.state
                in_vain.update(error.counts)
        metrics["broadcast_bits"] = state.broadcasted_bits - before.broadcasted_bits
        metrics["aggregated_bits"] = state.aggregated_bits - before.aggregated_bits
        metrics |= {name: metrics[name] + count for name, count in in_vain.items()}
        metrics["repeats"] = state.repeats - before.repeats
        metrics["seconds/evaluate"] = 0.0
        if state.round % run.evaluate_every == 0 or state.round == run.rounds:
            evaluating = perf_counter()
            for name, value in process.evaluate(state, test, run.test_batch_size).items():
                metrics[f"test/{name}"] = value
            metrics["seconds/evaluate"] = perf_counter() - evaluating
        metrics["seconds"] = perf_counter() - started
        yield state, metrics
