import os
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from fedq.config import RunConfig
from fedq.data import Client, Examples
from fedq.encoding import Encoder, PowerSGD, StateDictEncoder
from fedq.encoding.state_dict import flatten
from fedq.learning import FederatedAveraging, LocalTraining, ServerState
from fedq.models import MLP
from fedq.simulation import checkpoint
from fedq.simulation.loop import cohort, rounds
from fedq.simulation.workers import Workers

RUN = RunConfig(
    rounds=5,
    clients_per_round=2,
    seed=3,
    evaluate_every=2,
    test_batch_size=500,
    checkpoint_every=1,
    min_clients=1,
    workers=1,
    device="cpu",
)


class Noise:
    """A dataset of noise, which remembers who was read."""

    num_classes = 10
    num_clients = 6

    def __init__(self) -> None:
        self.read: list[int] = []

    def client(self, number: int) -> Client:
        def load() -> Examples:
            self.read.append(number)
            generator = torch.Generator().manual_seed(number)
            return Examples(torch.rand(20, 1, 28, 28, generator=generator), torch.arange(20) % 10)

        return Client(number, load)

    def test(self) -> Examples:
        return Examples(torch.zeros(10, 1, 28, 28), torch.arange(10))


def make_process() -> FederatedAveraging:
    return FederatedAveraging(
        partial(MLP, 10), LocalTraining(lr=0.1), partial(torch.optim.SGD, lr=1.0, momentum=0.5), seed=RUN.seed
    )


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
    assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand


def test_the_loop_reads_only_the_cohort_and_evaluates_when_told():
    dataset, process = Noise(), make_process()
    metrics = [m for _, m in rounds(process, process.initialize(), dataset, RUN)]
    assert [m["round"] for m in metrics] == [0, 1, 2, 3, 4]
    assert ["test/accuracy" in m for m in metrics] == [False, True, False, True, True]
    assert dataset.read == [int(n) for r in range(5) for n in cohort(RUN.seed, r, 6, 2)]
    for m in metrics:
        split = sum(m[f"seconds/{phase}"] for phase in ("train", "encode", "decode", "aggregate", "evaluate"))
        assert 0.5 * m["seconds"] < split <= m["seconds"] * 1.001


def test_workers_keep_the_order_and_run_side_by_side():
    meet = threading.Barrier(3, timeout=30)

    def task(item: int) -> tuple[int, int]:
        meet.wait()
        return item * item, torch.get_num_threads()

    with Workers(3) as workers:
        assert list(workers.map(task, range(9))) == [(i * i, 1) for i in range(9)]


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


def test_auto_takes_the_cores_this_process_may_use():
    with Workers() as workers:
        assert workers.count == len(os.sched_getaffinity(0))


def states_equal(a: ServerState, b: ServerState) -> bool:
    buffers = [s.optimizer["state"][0]["momentum_buffer"] for s in (a, b)]
    return (
        a.round == b.round
        and all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights | b.weights)
        and torch.equal(*buffers)
        and (a.broadcasted_bits, a.aggregated_bits) == (b.broadcasted_bits, b.aggregated_bits)
    )


def test_a_checkpoint_holds_all_there_is(tmp_path):
    process, dataset = make_process(), Noise()
    states = [state for state, _ in rounds(process, process.initialize(), dataset, RUN)]
    path = checkpoint.save(states[2], tmp_path / "checkpoints")
    loaded = checkpoint.load(path)
    assert states_equal(loaded, states[2])
    # going on from it gives the same as never having stopped
    *_, (last, _) = rounds(make_process(), loaded, dataset, RUN)
    assert states_equal(last, states[4])


def test_what_the_encoders_have_learnt_is_in_a_checkpoint(tmp_path):
    def learning() -> FederatedAveraging:
        chain = StateDictEncoder(Encoder([PowerSGD(2)]), 1000)
        return FederatedAveraging(
            partial(MLP, 10), LocalTraining(lr=0.1), partial(torch.optim.SGD, lr=1.0), chain, chain, seed=RUN.seed
        )

    process, dataset = learning(), Noise()
    states = [state for state, _ in rounds(process, process.initialize(), dataset, RUN)]
    loaded = checkpoint.load(checkpoint.save(states[2], tmp_path))
    for direction in ("broadcast", "upload"):
        start, kept, found = (flatten(getattr(s, direction)) for s in (process.initialize(), states[2], loaded))
        assert kept.keys() == found.keys() == start.keys()
        assert len(kept) == 3  # the layers above the threshold
        for path, value in kept.items():
            assert value.dtype == found[path].dtype
            assert torch.equal(value, found[path])
            assert not torch.equal(value, start[path])
    *_, (last, _) = rounds(learning(), loaded, dataset, RUN)
    assert all(torch.equal(value, last.weights[name]) for name, value in states[4].weights.items())
    assert all(torch.equal(value, flatten(last.upload)[path]) for path, value in flatten(states[4].upload).items())


def test_the_last_checkpoints_are_kept_and_no_half_written_one(tmp_path, monkeypatch):
    process = make_process()
    start = process.initialize()
    states = [state for state, _ in rounds(process, start, Noise(), RUN)]
    for state in states[:4]:
        checkpoint.save(state, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_000003.pt", "round_000004.pt"]

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(states[4], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["round_000003.pt", "round_000004.pt"]


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"round": Evil()}, tmp_path / "round_000001.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load(tmp_path / "round_000001.pt")
    assert not (tmp_path / "ran").exists()
