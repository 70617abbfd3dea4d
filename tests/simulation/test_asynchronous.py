"""Asynchronous rounds, against an implementation of FedBuff in numpy that shares no code with fedq."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import fedq
from learning.test_algorithms import CLASSES, FEATURES, Softmax, as_array, examples, gradient, make
from noise import RUN

from fedq.data import Examples
from fedq.encoding import Encoder, FixedWidth, HadamardRotation, StateDictEncoder, TopK, UniformQuantization
from fedq.errors import FedqError
from fedq.learning import ErrorFeedback, FedBuff, FederatedAveraging, FederatedDropout, LocalTraining, ServerState
from fedq.learning.error_feedback import Direction
from fedq.simulation import checkpoint
from fedq.simulation.asynchronous import Asynchronous, Flight, _unpacked, asynchronous_step
from fedq.simulation.loop import cohort
from fedq.simulation.network import Network
from fedq.simulation.workers import Workers

POPULATION, BUFFER, CONCURRENCY, ROUNDS, RATE, STEPS = 12, 3, 5, 14, 0.3, 4
LATENCY = [37 * (client + 1) ** 2 % 101 + 5 * client for client in range(POPULATION)]  # ms, from 0 to about 150
CONFIG = replace(RUN, clients_per_round=BUFFER)
TOP3, EXACT = StateDictEncoder(Encoder([TopK(3 / 24)]), threshold=4), StateDictEncoder()


@pytest.fixture
def network(tmp_path: Path) -> Network:
    rows = [f"1,0.5,{latency},{1 + client % 3}" for client, latency in enumerate(LATENCY)]
    (tmp_path / "trace.csv").write_text("\n".join(["down,up,latency,compute", *rows]))
    means = {"down": 1.0, "up": 1.0, "latency": 0.0, "compute": 0.001, "codec": 0.01}
    return Network(**means, link_spread=0.0, compute_spread=0.0, trace=str(tmp_path / "trace.csv"))


def process(network: Network, up: Direction = EXACT, down: Direction = EXACT, **more: Any) -> FederatedAveraging:
    test = Examples(*map(torch.from_numpy, examples(0)))
    return FederatedAveraging(
        Softmax,
        LocalTraining(lr=RATE, epochs=STEPS, batch_size=1000),
        partial(torch.optim.SGD, lr=0.7),
        down,
        up,
        algorithm=FedBuff(concurrency=CONCURRENCY),
        seed=CONFIG.seed,
        clock=partial(network.clock, examples=test, enough=BUFFER),
        **more,
    )


def stepped(run: FederatedAveraging, rounds: int, state: ServerState | None = None) -> tuple[ServerState, list[dict]]:
    """Returns the state after some more rounds, and their metrics without wall times."""
    step = asynchronous_step(run, CONFIG, POPULATION, lambda _, numbers: [*map(make, numbers)], ranks=1)
    assert step
    state, lines = state or run.initialize(), []
    for _ in range(rounds):
        state, metrics = step(state)
        lines.append({k: v for k, v in metrics.items() if "simulated" in k or not k.startswith("seconds")})
    return state, lines


class Buffered:
    """FedBuff (Nguyen 2022, algorithm 1) for softmax regression, in numpy."""

    def __init__(self, weights: np.ndarray, message: float, report: float, top: bool) -> None:
        self.weights, self.message, self.report, self.top = weights, message, report, top
        self.now, self.flying = 0.0, dict[int, tuple[float, int, np.ndarray]]()
        self.residual = {client: np.zeros_like(weights) for client in range(POPULATION)}

    def seconds(self, client: int) -> float:
        """2 round trips; bytes at 1 Mbit/s down and 0.5 Mbit/s up; training at 1 MFLOP/s; 10,000 parameters/s."""
        work = 2 * 2 * FEATURES * CLASSES  # forward, and the gradient of the weights
        computing = STEPS * len(examples(client)[1]) * work / 1e6 + 2 * CLASSES * (FEATURES + 1) / 1e4
        sent = 8 * (self.message / 1e6 + (self.message if not self.top else self.up) / 0.5e6 + self.report / 0.5e6)
        return 2 * LATENCY[client] / 1000 + computing / (1 + client % 3) + sent

    def sent(self, client: int, update: np.ndarray) -> np.ndarray:
        """The three largest weights, and all biases; the rest is added to the client's next update."""
        if not self.top:
            return update
        update = update + self.residual[client]
        kept = np.zeros_like(update)
        weights = np.abs(update[:, :-1])
        chosen = weights >= np.sort(weights.ravel())[-3]
        kept[:, :-1][chosen] = update[:, :-1][chosen]
        kept[:, -1] = update[:, -1]
        self.residual[client] = update - kept
        return kept

    def step(self, version: int, candidates: list[int]) -> list[int]:
        """Does a step of the server; returns the staleness of its answers."""
        answers: list[tuple[int, int, np.ndarray]] = []
        while len(answers) < BUFFER:
            while len(self.flying) < CONCURRENCY:
                client = candidates.pop(0)
                if client not in self.flying:
                    y = self.weights.copy()
                    for _ in range(STEPS):
                        y -= RATE * gradient(y, *examples(client))
                    update = self.sent(client, y - self.weights)
                    self.flying[client] = self.now + self.seconds(client), version, update
            client = min(self.flying, key=lambda one: self.flying[one][0])
            self.now, started, update = self.flying.pop(client)
            answers.append((len(examples(client)[1]), version - started, update))
        total = sum(size * update / math.sqrt(1 + stale) for size, stale, update in answers)
        self.weights = self.weights + 0.7 * total / sum(size for size, _, _ in answers)
        return [stale for _, stale, _ in answers]


@pytest.mark.parametrize("top", [False, True], ids=["exact", "error feedback"])
def test_fedbuff_is_the_papers(network: Network, top: bool) -> None:
    run = process(network, ErrorFeedback(TOP3) if top else EXACT)
    state, lines = stepped(run, ROUNDS)
    first = lines[0]
    numpy = Buffered(
        as_array(run.protocol.initial),
        first["broadcast_bits"] / 8 / BUFFER,
        first["report_bits"] / 8 / BUFFER,
        top,
    )
    numpy.up = first["aggregated_bits"] / 8 / BUFFER
    staleness = []
    for version, metrics in enumerate(lines):
        stale = numpy.step(version, cohort(CONFIG.seed, version, POPULATION, POPULATION).tolist())
        assert metrics["cumulative_simulated_seconds"] == pytest.approx(numpy.now, rel=1e-9)
        assert metrics["staleness"] == pytest.approx(np.mean(stale))
        staleness += stale
    np.testing.assert_allclose(as_array(state.weights), numpy.weights, atol=1e-6)
    assert len(set(staleness)) > 3  # otherwise the test would show little
    assert np.abs(numpy.weights - as_array(run.protocol.initial)).max() > 0.2
    assert metrics["clients"] == BUFFER and metrics["clients_failed"] == 0


def test_answers_to_several_broadcasts_are_decoded_one_by_one(network: Network) -> None:
    """Each round has another rotation: a sum of rotated updates of several rounds is no rotation of their sum."""
    rotated = StateDictEncoder(Encoder([HadamardRotation()]), threshold=0)
    (exact, _), (turned, _) = (stepped(process(network, up), 6) for up in (StateDictEncoder(threshold=0), rotated))
    # the messages have other lengths, but the schedule is the same
    for name, value in exact.weights.items():
        torch.testing.assert_close(turned.weights[name], value, rtol=1e-4, atol=1e-5)


def test_clients_follow_references_whatever_they_missed(network: Network) -> None:
    """Each client decodes only the messages sent to this client. The result is what the server expects."""
    uint8 = Encoder([UniformQuantization(8)], FixedWidth())
    run = process(network, down=StateDictEncoder(uint8, threshold=0, reference="last"))
    held: dict[int, list[Any]] = {}
    missed = []
    ask = run.cohort.ask

    def following(client, messages, received, record) -> Any:
        decoded = run.protocol.receive(messages, held.get(client.number, []))
        held[client.number] = [decoded.weights, decoded.reference]
        assert all(torch.equal(decoded.weights[name], value) for name, value in received.weights.items())
        missed.append(len(messages))
        return ask(client, messages, received, record)

    run.cohort = replace(run.cohort, ask=following)
    _, lines = stepped(run, ROUNDS)
    assert len(set(missed)) > 2
    assert all(metrics["clients_failed"] == 0 for metrics in lines)


@pytest.mark.parametrize("up", [EXACT, ErrorFeedback(TOP3)], ids=["exact", "error feedback"])
def test_answers_on_their_way_survive_a_checkpoint(network: Network, up: Direction, tmp_path: Path) -> None:
    with Workers(3) as workers:
        state, lines = stepped(process(network, up, map=workers.map), 7)
    run = process(network, up)
    half, first = stepped(run, 3)
    path = checkpoint.save(half, {}, tmp_path, keep=1)
    resumed, _ = checkpoint.load(path)
    assert len(resumed.in_flight) == CONCURRENCY - 1
    last, rest = stepped(run, 4, resumed)
    assert first + rest == lines
    assert all(torch.equal(value, last.weights[name]) for name, value in state.weights.items())


def test_answers_on_their_way_are_opened_on_the_device_of_the_process(network: Network) -> None:
    run = process(network)
    state, _ = stepped(run, 1)
    client, packed = next(iter(state.in_flight.items()))
    packed |= {"weights/batches": torch.tensor(3), "params/scale": torch.tensor(1.0)}
    received = _unpacked(client, packed, torch.device("meta")).asked.received
    assert received.weights["batches"].is_meta and received.upload_params["scale"].is_meta


def test_the_order_of_training_changes_nothing(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients train late and side by side. The result is the same if each client trains when asked."""
    state, lines = stepped(process(network), 5)
    run, batches = process(network), []
    asked = Asynchronous._asked

    def counting(self, broadcast, received, work, starts) -> dict[int, Flight]:
        batches.append(len(starts))
        return asked(self, broadcast, received, work, starts)

    monkeypatch.setattr(Asynchronous, "_asked", counting)
    stepped(run, 5)
    late = list(batches)
    batches.clear()
    monkeypatch.setattr("fedq.simulation.asynchronous.Asynchronous._earliest", lambda *_: 0.0)
    early, its_lines = stepped(run, 5)
    assert its_lines == lines and all(torch.equal(early.weights[n], value) for n, value in state.weights.items())
    assert sum(late) == sum(batches) and len([n for n in late if n]) < len([n for n in batches if n])


def test_clients_that_fail_leave_their_place_to_others(network: Network) -> None:
    run = process(replace(network, deadline=0.2))
    _, lines = stepped(run, ROUNDS)
    late = sum(metrics["clients_failed/late"] for metrics in lines)
    assert late == sum(metrics["clients_failed"] for metrics in lines) > 3
    assert all(metrics["clients"] == BUFFER for metrics in lines)
    assert all(metrics["uploads"] == BUFFER + metrics["clients_failed"] for metrics in lines)  # late answers are sent
    with pytest.raises(FedqError, match="0 of 12 clients sent a usable update, the round needs 3, and no client"):
        stepped(process(replace(network, deadline=1e-6)), 1)


@pytest.mark.parametrize(
    ("changes", "more", "sentence"),
    [
        ({"clock": None}, {}, "algorithm=fedbuff needs a simulated time: choose run/network"),
        ({"submodel": FederatedDropout(0.5)}, {}, "run.submodel: algorithm=fedbuff needs clients that train the whole"),
        ({}, {"ranks": 2}, "algorithm=fedbuff runs in one process"),
        (
            {},
            {"population": 7},
            "algorithm.concurrency=5 and run.clients_per_round=3 need 8 clients: the dataset has 7",
        ),
    ],
)
def test_what_an_asynchronous_run_cannot_have_is_told_in_one_sentence(
    network: Network, changes: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    class Parted(Softmax):
        units = {"classes": (("weight", 0), ("bias", 0))}  # noqa: RUF012

    given = {
        "algorithm": FedBuff(concurrency=CONCURRENCY),
        "clock": partial(network.clock, examples=make(0).load(), enough=3),
    }
    training, server = LocalTraining(lr=RATE), partial(torch.optim.SGD, lr=1.0)
    run = FederatedAveraging(Parted, training, server, **given | changes)
    arguments = {"population": POPULATION, "ranks": 1} | more
    with pytest.raises(FedqError, match=sentence):
        asynchronous_step(run, CONFIG, clients=lambda _, numbers: [*map(make, numbers)], **arguments)


SMALL = (
    *("dataset=writers", "dataset.clients=12", "dataset.examples_per_client=10", "dataset.test_examples=50"),
    *("model=mlp", "run.clients_per_round=3", "run.evaluate_every=1", "algorithm=fedbuff", "algorithm.concurrency=4"),
)


def test_a_command_with_failing_clients_and_adaptive_parts_resumes(tmp_path: Path) -> None:
    def lines(folder: str, *more: str) -> list[dict[str, float]]:
        options = ("run/network=mobile", "run/faults=some", "run.network.deadline=3", "encoder=bit_budget")
        fedq(tmp_path, *SMALL, *options, f"hydra.run.dir={folder}", *more)
        text = (tmp_path / folder / "metrics.jsonl").read_text()
        return [
            {k: v for k, v in json.loads(line).items() if "simulated" in k or not k.startswith("seconds")}
            for line in text.splitlines()
        ]

    feedback = "encoder.upload.error_feedback=true"
    whole = lines("whole", "run.rounds=5", feedback, "run.workers=1")
    lines("parts", "run.rounds=2", feedback, "run.workers=3")
    assert lines("parts", "run.rounds=5", feedback) == whole
    assert sum(line["clients_failed"] for line in whole) > 0
    refused = fedq(tmp_path, *SMALL, "hydra.run.dir=refused", code=1).stderr
    assert "algorithm=fedbuff needs a simulated time" in refused
    refused = fedq(tmp_path, *SMALL, "run/network=mobile", "run.network.over_selection=1", code=1).stderr
    assert "run.network.over_selection must be 0 with algorithm=fedbuff" in refused
