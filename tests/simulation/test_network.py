"""Simulated time: links, the seconds of an answer and of a round, deadlines and over-selection."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from command import fedq
from noise import RUN, Noise

from fedq.data import Client, Examples
from fedq.encoding import Encoder, FixedWidth, Key, StateDictEncoder, UniformQuantization
from fedq.errors import FedqError
from fedq.learning import Classification, ClientFailure, FederatedAveraging, LocalTraining, NextToken, TooFewClients
from fedq.models import MLP, CharLSTM
from fedq.simulation.loop import rounds
from fedq.simulation.network import Network, operations

MEANS = {"down": 20.0, "up": 5.0, "latency": 50.0, "compute": 2.0, "codec": 10.0}
DRAWN = Network(**MEANS, link_spread=0.8, compute_spread=0.4)
WORK = 879_200  # 2 · (3 · 784 · 200 − 784 · 200 + 3 · (200 · 200 + 200 · 10)): no gradient of the inputs
PARAMETERS = 784 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
LINKS = [(8, 2, 100, 1), (80, 20, 10, 4), (4, 1, 0, 0.5), (16, 4, 20, 2), (1, 0.25, 50, 1), (2, 2, 30, 1)]
UINT8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    rows = [",".join(map(str, link)) for link in LINKS]
    path.write_text("\n".join(["down,up,latency,compute", *rows]) + "\n")
    return str(path)


def clients(numbers: list[int]) -> list[Client]:
    return [Noise().client(number) for number in numbers]


def process(links: Network, enough: int = 2, **more: object) -> FederatedAveraging:
    clock = partial(links.clock, examples=Noise().test(), enough=enough)
    server = partial(torch.optim.SGD, lr=1.0)
    return FederatedAveraging(partial(MLP, 10), LocalTraining(lr=0.1), server, UINT8, UINT8, clock=clock, **more)


def seconds(client: int, message: int, report: int = 48 + 4 * 8) -> float:
    """Returns the time of an answer of a client with 20 examples, by hand; messages are in bytes."""
    down, up, latency, compute = LINKS[client]
    computing = (20 * WORK / 2e9 + 2 * PARAMETERS / 10e6) / compute
    return 2 * latency / 1000 + 8 * message / (down * 1e6) + computing + 8 * (message + report) / (up * 1e6)


def test_the_work_needs_a_test_set_that_fits() -> None:
    none, one, wrong = (
        Examples(torch.zeros(number, *shape), torch.zeros(number, dtype=torch.int64))
        for number, shape in ((0, (1, 28, 28)), (1, (1, 28, 28)), (2, (5,)))
    )
    for examples, sentence in ((none, "run.network needs a test set"), (wrong, "examples of the test set: the model")):
        with pytest.raises(FedqError, match=sentence):
            operations(MLP(10), Classification(), examples)
    norm = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(784), torch.nn.Linear(784, 10))
    assert operations(norm, Classification(), one) == 2 * 3 * 784 * 10


def test_links_are_log_normal_with_the_means_and_spreads_of_the_configuration() -> None:
    links = [DRAWN.link(client, seed=7) for client in range(40_000)]
    for name, mean in (("down", 20.0), ("up", 5.0), ("latency", 50.0), ("compute", 1.0)):
        values = [getattr(link, name) for link in links]
        spread = 0.4 if name == "compute" else 0.8
        # the standard error of the mean is below 0.5 %, and that of the deviation of the logarithm 0.35 %
        assert fmean(values) == pytest.approx(mean, rel=0.025)
        assert stdev(map(math.log, values)) == pytest.approx(spread, rel=0.02)
    assert all(link.down == pytest.approx(4 * link.up) for link in links[:50])
    assert DRAWN.link(5, seed=7) == links[5] != DRAWN.link(5, seed=8)
    assert replace(DRAWN, link_spread=0.0, compute_spread=0.0).link(3, seed=1) == (20.0, 5.0, 50.0, 1.0)


def test_the_work_of_training_is_counted() -> None:
    assert operations(MLP(10), Classification(), Noise().test()) == WORK
    # a recurrent layer: four gates of inputs and of states, at 80 places, forward and twice backward
    text = Examples(torch.zeros(2, 80, dtype=torch.int64), torch.zeros(2, 80, dtype=torch.int64))
    model = CharLSTM(90)
    wide = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert 0.95 < operations(model, NextToken(), text) / (6 * 80 * wide) <= 1
    dropping = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(784), torch.nn.Dropout(), MLP(10).dense1)
    before = torch.get_rng_state()
    operations(dropping, Classification(), Noise().test())
    assert torch.equal(before, torch.get_rng_state()) and not dropping[1].num_batches_tracked


def test_a_round_takes_as_long_as_its_slowest_client(trace: str) -> None:
    run = process(Network(**MEANS, link_spread=0, compute_spread=0, trace=trace))
    state, total = run.initialize(), 0.0
    for cohort in ([0, 1, 3], [2, 5, 0], [1, 3, 5]):
        state, metrics = run.next(state, clients(cohort))
        message = metrics["broadcast_bits"] / 8 / len(cohort)
        assert metrics["seconds/simulated"] == pytest.approx(max(seconds(one, message) for one in cohort))
        total += metrics["seconds/simulated"]
        assert metrics["cumulative_simulated_seconds"] == state.simulated_seconds == pytest.approx(total)
        assert metrics["clients_failed"] == 0


@pytest.mark.parametrize("over_selection", [0, 2])
def test_late_clients_are_left_out_with_their_weight(trace: str, over_selection: int) -> None:
    network = Network(**MEANS, link_spread=0, compute_spread=0, trace=trace, over_selection=over_selection)
    exact = process(replace(network, over_selection=0))
    message = exact.next(exact.initialize(), clients([1]))[1]["broadcast_bits"] / 8
    cohort = [4, 0, 2, 1, 3]
    order = sorted(cohort, key=lambda one: seconds(one, message))
    assert order == [1, 3, 0, 2, 4]
    limit = seconds(order[2], message)
    run = process(network if over_selection else replace(network, deadline=limit + 1e-9), enough=3)
    state, metrics = run.next(run.initialize(), clients(cohort))
    assert metrics["clients"] == 3 and metrics["clients_failed"] == metrics["clients_failed/late"] == 2
    assert metrics["uploads"] == 5  # late answers are sent, and count
    assert metrics["broadcast_bits"] == 5 * 8 * message
    assert metrics["seconds/simulated"] == pytest.approx(limit)
    alone, _ = exact.next(exact.initialize(), clients([0, 1, 3]))
    for name, value in state.weights.items():
        torch.testing.assert_close(value, alone.weights[name])


def test_a_client_without_an_answer_takes_the_place_of_none(trace: str) -> None:
    """Client 1 has the fastest link and no examples: the round ends with the answers of 3 and 0."""
    network = Network(**MEANS, link_spread=0, compute_spread=0, trace=trace, over_selection=2)
    empty = Client(1, lambda: Examples(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64)))
    run = process(network, enough=2)
    _, metrics = run.next(run.initialize(), [empty, *clients([2, 0, 3])])
    assert (metrics["clients"], metrics["clients_failed/unable"], metrics["clients_failed/late"]) == (2, 1, 1)
    message = metrics["broadcast_bits"] / 8 / 4
    assert metrics["seconds/simulated"] == pytest.approx(seconds(0, message))


@pytest.mark.parametrize("wrong", [{"latency": 1e308}, {"down": 1e-320}])
def test_an_answer_that_takes_a_century_ends_the_run(wrong: dict[str, float]) -> None:
    run = process(Network(**MEANS | wrong, link_spread=0, compute_spread=0))
    with pytest.raises(FedqError, match="run.network: an answer of client 3 takes .* seconds, more than a century"):
        run.next(run.initialize(), clients([3]))


def test_of_equal_times_the_first_places_win() -> None:
    run = process(Network(**MEANS, link_spread=0, compute_spread=0, over_selection=2), enough=2)
    _, metrics = run.next(run.initialize(), clients([3, 1, 0, 2]))
    assert (metrics["clients"], metrics["clients_failed/late"]) == (2, 2)
    assert run.clock is not None
    assert run.clock.in_time({0: 2.0, 1: 1.0, 2: 1.0, 3: 1.0}) == {1, 2}


def test_a_server_with_a_deadline_waits_for_silent_clients_until_then(trace: str) -> None:
    def crashing(message: bytes, key: Key) -> bytes:
        if key.client == 1:
            raise ClientFailure("silent", "it crashed")
        return message

    network = Network(**MEANS, link_spread=0, compute_spread=0, trace=trace)
    with_deadline = process(replace(network, deadline=9.0), network=crashing)
    _, metrics = with_deadline.next(with_deadline.initialize(), clients([1, 3]))
    assert (metrics["seconds/simulated"], metrics["clients"]) == (9.0, 1)
    without = process(network, network=crashing)
    _, metrics = without.next(without.initialize(), clients([1, 3]))
    assert metrics["seconds/simulated"] == pytest.approx(seconds(3, metrics["broadcast_bits"] / 16))
    # a cohort that fails also takes its time
    run = replace(RUN, clients_per_round=2, repeats=1, network={"over_selection": 0})
    failing = process(replace(network, deadline=0.001))
    with pytest.raises(TooFewClients) as error:
        list(rounds(failing, failing.initialize(), Noise(), run))
    assert error.value.state.simulated_seconds == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("down,up,latency\n1,1,1\n", "no column 'compute'; it needs down, up, latency, compute"),
        ("down,up,latency,compute\n", "no row below its header"),
        ("down,up,latency,compute\n1,1,1,1\n1,x,1,1\n", "line 3: down, up and compute must be finite numbers above 0"),
        ("down,up,latency,compute\n1,1,-1,1\n", "line 2: "),
        ("down,up,latency,compute\n0,1,1,1\n", "line 2: "),
        ("down,up,latency,compute\n1,inf,1,1\n", "line 2: "),
        ("down,up,latency,compute\n1,1\n", "line 2: "),
        ("down,up,latency,compute\n" + 200_000 * "1", "cannot be read: field larger than"),
        (None, "cannot be read"),
    ],
)
def test_a_trace_that_is_none_is_told_in_one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "trace.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FedqError, match=sentence) as error:
        replace(DRAWN, trace=str(path))
    assert str(error.value).startswith("run.network.trace: ") and "\n" not in str(error.value)


def test_a_trace_may_begin_with_a_mark_of_byte_order(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("\ufeff" + 'down,up,latency,compute\n"1",2,3,4\n', encoding="utf-8")
    assert replace(DRAWN, trace=str(tmp_path / "trace.csv")).link(5, 0) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"down": 0.0}, {"deadline": 0.0}, {"latency": -1.0}, {"over_selection": -1}, {"over_selection": 1.5}),
        *({"latency": math.inf}, {"link_spread": 40.0}, {"compute_spread": math.inf}),
    ],
)
def test_a_network_needs_rates_and_times(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(DRAWN, **wrong)


SMALL = (
    *("dataset=writers", "dataset.clients=8", "dataset.examples_per_client=10", "dataset.test_examples=50"),
    *("model=mlp", "run.clients_per_round=3", "run.evaluate_every=1"),
)


def test_a_run_on_a_network_resumes_and_changes_only_what_it_should(tmp_path: Path) -> None:
    def lines(folder: str, *more: str, **options: int) -> list[dict[str, float]]:
        fedq(tmp_path, *SMALL, f"hydra.run.dir={folder}", *more, **options)
        text = (tmp_path / folder / "metrics.jsonl").read_text()
        timed = {f"seconds/{phase}" for phase in ("train", "encode", "decode", "aggregate", "evaluate")} | {"seconds"}
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()]

    plain = lines("plain", "run.rounds=3")
    assert not any("simulated" in name for line in plain for name in line)
    whole = lines("whole", "run/network=mobile", "run.rounds=3", "run.network.over_selection=2", "run.workers=1")
    lines("parts", "run/network=mobile", "run.rounds=1", "run.network.over_selection=2")
    assert lines("parts", "run/network=mobile", "run.rounds=3", "run.network.over_selection=2") == whole
    assert [line["clients_failed/late"] for line in whole] == [2, 2, 2]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["broadcast_ratio"] == summary["upload_ratio"]
    simulated = lines("simulated", "run/network=data_centre", "run.rounds=3")
    assert [{k: v for k, v in line.items() if "simulated" not in k} for line in simulated] == plain
    errors = {
        ("run/network=mobile", "run.network.over_selection=6"): "9 with run.network.over_selection is more than the 8",
        ("run/network=mobile", "run/faults=some"): "run.network.deadline must be given with run.faults",
        ("run/network=mobile", "run.network.down=-1"): "run.network: down must be above 0, not -1",
        ("run.network=mobile",): "run/network=mobile chooses a file of the group",
    }
    for arguments, sentence in errors.items():
        assert sentence in fedq(tmp_path, *SMALL, *arguments, code=1).stderr
