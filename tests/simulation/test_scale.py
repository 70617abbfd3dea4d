import threading
import time
import tracemalloc
import weakref
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from fedq.config import build, build_run
from fedq.data import Client, Examples
from fedq.learning import FederatedAveraging, LocalTraining, server
from fedq.models import MLP
from fedq.simulation.loop import cohort, rounds
from fedq.simulation.workers import Workers
from fedq.train import CONF

COHORT, WORKERS = 200, 2


def make_process(**options) -> FederatedAveraging:
    return FederatedAveraging(partial(MLP, 10), LocalTraining(lr=0.1), partial(torch.optim.SGD, lr=1.0), **options)


class Alive:
    """Counts the tensors still in memory, of all that it was shown, and their largest number."""

    def __init__(self) -> None:
        self.now = self.most = self.seen = 0
        self._lock = threading.RLock()
        self._references: dict[int, weakref.ref[Tensor]] = {}

    def watch(self, tensor: Tensor) -> None:
        with self._lock:
            self.seen += 1
            self._references[self.seen] = weakref.ref(tensor, partial(self._gone, self.seen))
            self.now += 1
            self.most = max(self.most, self.now)

    def _gone(self, number: int, reference: object) -> None:
        with self._lock:
            del self._references[number]
            self.now -= 1


@pytest.mark.parametrize(("population", "size"), [(10**8, 3), (10**9, 1000)])
def test_a_cohort_is_drawn_without_a_list_of_the_population(population, size):
    tracemalloc.start()
    try:
        drawn = cohort(0, 0, population, size)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert len(drawn) == size


def test_a_round_over_a_hundred_million_clients_holds_no_more_than_one_over_ten():
    def peak(population: int) -> int:
        with initialize_config_dir(str(CONF), version_base=None):
            overrides = ["dataset=writers", f"dataset.clients={population}", "dataset.test_examples=10"]
            cfg = compose("config", [*overrides, "run.clients_per_round=3", "run.rounds=1"])
        process = make_process()
        tracemalloc.start()  # measures the memory of Python and numpy; one byte a client would be 100 MB
        try:
            dataset = build(cfg, "dataset")
            [(state, metrics)] = rounds(process, process.initialize(), dataset, build_run(cfg))
            assert dataset.num_clients == population
            assert (state.round, metrics["clients"], metrics["clients_failed"]) == (1, 3, 0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # loads all modules
    assert peak(10**8) < peak(10) + 2e6


def test_updates_and_examples_held_do_not_grow_with_the_cohort(monkeypatch):
    updates, examples = Alive(), Alive()
    weighted = server.weighted

    def watched(*args):
        update = weighted(*args)
        if update:  # FedAvg has no other groups
            updates.watch(next(iter(update.values())))
        return update

    def load(place: int, count: int) -> Examples:
        if place == 0:  # the first client takes long, so the second worker could run far ahead
            time.sleep(0.5)
        x = torch.zeros(count, 1, 28, 28)
        examples.watch(x)
        return Examples(x, torch.zeros(count, dtype=torch.int64))

    monkeypatch.setattr(server, "weighted", watched)
    # neighbours differ in size: if the whole cohort were sorted by size, one half would wait for the other
    sizes = [4 - 3 * (place % 2) for place in range(COHORT)]
    clients = [Client(place, partial(load, place, size), size) for place, size in enumerate(sizes)]
    with Workers(WORKERS) as workers:
        process = make_process(map=workers.map)
        state = process.initialize()
        broadcast, _ = process.downlink.open(state, range(COHORT))
        result = process.contribute(broadcast, enumerate(clients))
    assert len(result.records) == updates.seen == examples.seen == COHORT
    assert not any(record.failure for record in result.records.values())
    # half of 16 sorted clients, 8 levels of the tree, waiting results, and clients in training
    assert updates.most <= 8 + 8 + (2 * WORKERS + 1) + WORKERS + 2
    assert examples.most <= WORKERS
