"""Several processes, started like torchrun's, give the same results as one process."""

import itertools
import os
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import PROCESSES
from torch.utils.checkpoint import checkpoint

from fedq.data import Client, Examples
from fedq.encoding import (
    Encoder,
    FixedWidth,
    HadamardRotation,
    PowerSGD,
    ScaledSign,
    StateDictEncoder,
    UniformQuantization,
)
from fedq.learning import ErrorFeedback, FedAvg, FederatedAveraging, FederatedDropout, LocalTraining
from fedq.learning.aggregation import PairwiseTree
from fedq.learning.clock import Clock
from fedq.learning.error_feedback import Direction
from fedq.learning.guard import NormGuard
from fedq.models import MLP
from fedq.simulation import ranks as ranks_module
from fedq.simulation.client_state_files import ClientStateFiles
from fedq.simulation.ranks import RankLost, Ranks, split
from fedq.simulation.stopping import Stopping
from fedq.simulation.workers import Workers

SIZES = [7, 60, 3, 21, 40, 5, 1, 33, 12, 18, 9]  # uneven clients; their number is no power of two
BAD = 4  # the place of a client whose update is NaN
ROTATED = StateDictEncoder(Encoder([HadamardRotation(), UniformQuantization(4)], FixedWidth()), 1000)


def make_client(number: int) -> Client:
    def load() -> Examples:
        generator = torch.Generator().manual_seed(number)
        x = torch.rand(SIZES[number], 1, 28, 28, generator=generator)
        return Examples(x / 0 if number == BAD else x, torch.randint(10, (len(x),), generator=generator))

    return Client(number, load, SIZES[number])


SGD = LocalTraining(lr=0.1)
KEEPING = LocalTraining(
    lr=0.001,
    steps=3,
    optimizer=torch.optim.Adam,
    max_grad_norm=1.0,
    schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    keep_optimizer=True,
)


class Dropping(MLP):
    """A model that draws, also when a checkpoint repeats its middle layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(checkpoint(F.dropout, x, 0.1, use_reentrant=False) + 0.01 * torch.randn(28))


def make_process(
    upload: Direction,
    workers: Workers,
    store: ClientStateFiles,
    dropout: FederatedDropout | None = None,
    model: type[MLP] = MLP,
    training: LocalTraining = SGD,
) -> FederatedAveraging:
    server = partial(torch.optim.SGD, lr=1.0, momentum=0.5)
    broadcast = learning() if dropout else ROTATED  # with dropout, ranks encode broadcasts and report
    personal: list[str] = []
    if isinstance(upload, ErrorFeedback):  # clients with residuals also keep their last weights and personal tensors
        broadcast, personal = replace(ROTATED, reference="last"), ["dense3.*"]
    return FederatedAveraging(
        partial(model, 10),
        training,
        server,
        broadcast,
        upload,
        seed=5,
        map=workers.map,
        store=store,
        submodel=dropout,
        algorithm=FedAvg(personal=personal),
        guard=NormGuard("clip", multiple=1.0),  # clips about half of the updates from the second round on
        clock=lambda protocol: Clock(lambda record, examples: examples + record.bits / 1e9, enough=9),
    )


def learning() -> StateDictEncoder:
    return StateDictEncoder(Encoder([PowerSGD(2)]), 1000)  # ranks add up its reports


def feeding_back() -> ErrorFeedback:
    chain = Encoder([HadamardRotation(), ScaledSign()], FixedWidth())
    return ErrorFeedback(StateDictEncoder(chain, 1000))


def run(
    rank: int,
    size: int,
    workers: int,
    port: int,
    upload: Direction,
    folder: Path,
    queue,
    rounds: int = 3,
    dropout: FederatedDropout | None = None,
    model: type[MLP] = MLP,
    training: LocalTraining = SGD,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with Ranks(Stopping()) as ranks, Workers(workers) as pool:
        store = ClientStateFiles(folder, 5, 10**6, shared=size > 1)
        process = make_process(upload, pool, store, dropout, model, training)
        if rank:
            for order in ranks.listen():
                ranks.contribute_to(order, process.contribute, lambda _, numbers: [*map(make_client, numbers)])
            return
        store.resume(0)
        state = process.initialize()
        clients = [make_client(number) for number in range(len(SIZES))]
        for _ in range(rounds):
            clients = clients[1:] + clients[:1]  # the ranks have other clients in the next round
            state, metrics = process.next(state, clients, partial(ranks.gather, process.contribute))
        test = make_client(0).load()
        metrics |= process.evaluate(state, test, clients=[(one.number, test) for one in clients])
        counts = {name: value for name, value in metrics.items() if not name.startswith("seconds")}
        weights = {name: value.numpy().tobytes() for name, value in state.weights.items()}
        queue.put((weights, counts, state.broadcasted_bits, state.aggregated_bits, state.reported_bits))


def free_port() -> int:
    """Returns a free port whose successor is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            try:
                second.bind(("localhost", first.getsockname()[1] + 1))
            except OSError:
                continue
            return first.getsockname()[1]


SOME = ((2, 2), (3, 1))  # (ranks, workers of each rank)


@pytest.mark.parametrize(
    ("upload", "dropout", "model", "training", "numbers"),
    [
        (ROTATED, None, MLP, SGD, ((1, 2), (2, 1), (2, 2), (3, 1), (4, 2))),
        (learning(), None, MLP, SGD, SOME),
        (feeding_back(), None, MLP, SGD, SOME),
        (learning(), FederatedDropout(0.5), MLP, SGD, SOME),
        (ROTATED, None, Dropping, SGD, SOME),
        (feeding_back(), None, MLP, KEEPING, SOME),
    ],
    ids=[
        "summed before it is decoded",
        "adaptive",
        "with error feedback",
        "dropout",
        "a model that draws",
        "kept optimizers",
    ],
)
def test_any_number_of_ranks_and_workers_gives_the_same_bits(upload, dropout, model, training, numbers, tmp_path):
    def outcome(size: int, workers: int):
        queue, port, folder = PROCESSES.Queue(), free_port(), tmp_path / f"{size} {workers}"
        arguments = (size, workers, port, upload, folder, queue, 3, dropout, model, training)
        started = [PROCESSES.Process(target=run, args=(rank, *arguments)) for rank in range(size)]
        for process in started:
            process.start()
        result = queue.get(timeout=120)
        for process in started:
            process.join(60)
            assert process.exitcode == 0
        return result

    alone = outcome(1, 1)
    assert [alone[1][f"clients_failed/{kind}"] for kind in ("unable", "late")] == [1, 1]
    assert 33 < alone[1]["cumulative_simulated_seconds"] / 3 < 34  # client 4 cannot answer, and takes no place
    for size, workers in numbers:
        assert outcome(size, workers) == alone, (size, workers)


def test_what_crosses_is_a_few_partial_sums():
    """Every part of the cohort adds up to at most two sums for each level of the tree."""

    for first, last in itertools.combinations(range(65), 2):
        tree: PairwiseTree[int] = PairwiseTree(lambda a, b: a + b)
        for place in range(first, last):
            tree.add(place, 1)
        sums = tree.partial_results()
        assert len(sums) <= 2 * max(1, (last - first).bit_length())
        assert sum(value for _, _, value in sums) == last - first
        for level, place, value in sums:
            assert value == 2**level
            assert first <= place << level < last


def test_cohorts_are_cut_into_neighbourhoods_of_equal_cost():
    assert split([1] * 12, 4) == [0, 3, 6, 9, 12]
    assert split([9, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2) == [0, 1, 10]
    assert split([5, 0, 0], 1) == [0, 3]
    bounds = split([3], 4)  # more ranks than clients: some ranks have no client
    assert (bounds[0], bounds[-1]) == (0, 1)
    assert bounds == sorted(bounds)
    costs = [(37 * i) % 101 + 1 for i in range(1000)]
    cuts = split(costs, 8)
    sums = [sum(costs[a:b]) for a, b in itertools.pairwise(cuts)]
    assert max(sums) - min(sums) <= 2 * max(costs)


def lose(rank: int, port: int, folder: Path, queue) -> None:
    """Rank 1 dies in the middle of a round; the queue receives how rank 0 ends."""
    started = time.monotonic()
    if rank:
        threading_kill(queue)
    try:
        run(rank, 2, 1, port, StateDictEncoder(), folder, queue, rounds=10**6)
    except RankLost as error:
        queue.put((str(error), time.monotonic() - started))


def fail(rank: int, port: int, folder: Path, queue) -> None:
    """Only rank 0 fails in a round, and rank 1 waits for rank 0. The queue receives how long each rank lives."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def contribute(broadcast, clients, agree):
        raise OSError("a file is damaged")

    try:
        with Ranks(Stopping()) as ranks:
            if rank:
                process = make_process(StateDictEncoder(), Workers(1), ClientStateFiles(folder, 5, 10**6, shared=True))
                for order in ranks.listen():
                    ranks.contribute_to(order, process.contribute, lambda _, n: [*map(make_client, n)])
            process = make_process(StateDictEncoder(), Workers(1), ClientStateFiles(folder, 5, 10**6, shared=True))
            broadcast, _ = process.downlink.open(process.initialize(), range(4))
            started = time.monotonic()
            assert not ranks.apart
            try:
                ranks.gather(contribute, broadcast, [make_client(number) for number in range(4)])
            finally:
                queue.put((ranks.apart, started))
    except OSError:
        queue.put(("rank 0", time.monotonic()))
    except RankLost:
        queue.put(("rank 1", time.monotonic()))


def threading_kill(queue) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 2.0)


def start_two(target, folder: Path):
    """Starts `target` as ranks 0 and 1; returns their queue and the processes."""
    queue, port = PROCESSES.Queue(), free_port()
    started = [PROCESSES.Process(target=target, args=(rank, port, folder, queue)) for rank in range(2)]
    for process in started:
        process.start()
    return queue, started


def test_a_rank_that_dies_takes_the_others_down_with_a_clear_message(tmp_path):
    queue, started = start_two(lose, tmp_path)
    message, seconds = queue.get(timeout=60)
    assert "rank 0 lost the connection to another rank" in message
    assert seconds < 2 + ranks_module.PATIENCE
    for process in started:
        process.join(60)
    assert started[1].exitcode == -signal.SIGKILL


def test_a_round_that_fails_on_rank_0_alone_ends_all_at_once(tmp_path):
    """The other ranks wait in the round and would misread any order, so the sweep ends."""
    queue, started = start_two(fail, tmp_path)
    apart, since = queue.get(timeout=60)
    assert apart is True
    ends = dict(queue.get(timeout=60) for _ in range(2))
    assert ends.keys() == {"rank 0", "rank 1"}
    assert max(ends.values()) - since < ranks_module.PATIENCE / 2
    for process in started:
        process.join(60)
