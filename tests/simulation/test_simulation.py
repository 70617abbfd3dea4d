import os
import threading
import time

import numpy as np
import pytest
import torch
from noise import RUN, Noise, make_process

from fedq.learning.aggregation import one_thread
from fedq.simulation.loop import cohort, rounds
from fedq.simulation.workers import Workers


def test_a_cohort_is_drawn_without_replacement_from_its_key():
    drawn = cohort(0, 0, 10, 10)
    assert sorted(drawn) == list(range(10))
    assert cohort(0, 0, 1000, 10).tolist() == cohort(0, 0, 1000, 10).tolist()
    assert cohort(0, 0, 1000, 10).tolist() != cohort(0, 1, 1000, 10).tolist()
    assert cohort(0, 0, 1000, 10).tolist() != cohort(1, 0, 1000, 10).tolist()
    assert len(set(cohort(0, 0, 10**9, 1000).tolist())) == 1000


def test_every_client_is_drawn_equally_often():
    counts = np.bincount(np.concatenate([cohort(7, r, 20, 5) for r in range(4000)]), minlength=20)
    expected = 4000 * 5 / 20
    chi_square = ((counts - expected) ** 2 / (expected * (1 - 5 / 20))).sum()
    assert chi_square < 43.8  # chi-square with 19 degrees of freedom, exceeded once in a thousand


def test_the_loop_reads_only_the_cohort_and_evaluates_when_told():
    dataset, process = Noise(), make_process()
    metrics = [m for _, m in rounds(process, process.initialize(), dataset, RUN)]
    assert [m["round"] for m in metrics] == [0, 1, 2, 3, 4]
    assert ["test/accuracy" in m for m in metrics] == [False, True, False, True, True]
    # a further read of client 0 checks the dataset
    assert dataset.read == [0] + [int(n) for r in range(5) for n in cohort(RUN.seed, r, 6, 2)]
    phases = ("train", "encode", "decode", "aggregate", "evaluate")
    splits = [sum(m[f"seconds/{phase}"] for phase in phases) / m["seconds"] for m in metrics]
    assert all(m[f"seconds/{phase}"] > 0 for m in metrics for phase in phases[:-1])
    # a busy machine may disturb some rounds, but not every round
    assert 0.5 < max(splits) <= 1.001


def test_workers_keep_the_order_and_run_side_by_side():
    meet = threading.Barrier(3, timeout=30)

    def task(item: int) -> tuple[int, int]:
        meet.wait()
        return item * item, torch.get_num_threads()

    torch.set_num_threads(2)  # a process outside the tests has several threads
    try:
        with Workers(3) as workers:
            assert list(workers.map(task, range(9))) == [(i * i, 1) for i in range(9)]
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_workers_do_not_run_ahead_of_who_takes_the_results():
    taken: list[int] = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with Workers(2) as workers:
        results = workers.map(lambda i: i, items())
        assert next(results) == 0
        assert len(taken) <= 5
        assert list(results) == list(range(1, 100))


def test_an_error_in_a_worker_comes_through_and_ends_the_rest():
    started: list[int] = []

    def task(item: int) -> int:
        started.append(item)
        time.sleep(0.01)
        if item == 0:
            raise KeyError("broken")
        return item

    with Workers(1) as workers, pytest.raises(KeyError, match="broken"):
        list(workers.map(task, range(1000)))
    assert len(started) <= 4


def test_auto_takes_the_cores_this_process_may_use(monkeypatch):
    with Workers() as workers:
        assert workers.count == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    with Workers() as workers:
        assert workers.count == 1
