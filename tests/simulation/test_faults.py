import itertools
import math
from collections import Counter
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from noise import RUN, Noise

from fedq.data import Client, Examples
from fedq.encoding import (
    ANS,
    Encoder,
    FixedWidth,
    Key,
    MessageError,
    StateDictEncoder,
    TopK,
    UniformQuantization,
    schema_of,
)
from fedq.learning import ClientFailure, FederatedAveraging, LocalTraining, TooFewClients
from fedq.models import MLP
from fedq.simulation.faults import Faults
from fedq.simulation.loop import cohort, rounds
from fedq.tracking.summary import Summary

REPORT = 48 + 4 * 8  # bytes of a report: the frame, a loss and three counts
KINDS = [field.name for field in fields(Faults)]
CHAINS = {
    "float32": Encoder(),
    "uint8": Encoder([UniformQuantization(8)], FixedWidth()),
    "ans": Encoder([UniformQuantization(4)], ANS()),
    "top_k": Encoder([TopK(0.1)]),
}


def key(i: int) -> Key:
    return Key(3, i // 100, i % 100)


def test_each_fault_comes_as_often_as_it_should():
    faults = Faults(absent=0.3, crash=0.1, late=0.05, nan=0.02, damaged=0.2, replayed=0.01)
    n = 20_000
    counts = Counter(faults.drawn(key(i)) for i in range(n))
    for kind in KINDS:
        p = getattr(faults, kind)
        assert abs(counts[kind] - n * p) < 4 * math.sqrt(n * p * (1 - p)), kind
    assert [faults.drawn(key(i)) for i in range(50)] == [faults.drawn(key(i)) for i in reversed(range(50))][::-1]
    assert Counter(Faults().drawn(key(i)) for i in range(100)) == {None: 100}


@pytest.mark.parametrize("wrong", [{"nan": 1.5}, {"late": -0.1}, {"crash": 0.6, "absent": 0.6}, {"late": math.nan}])
def test_probabilities_must_be_some(wrong):
    with pytest.raises(ValueError, match="must"):
        Faults(**wrong)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", ["nan", "damaged", "replayed"])
def test_what_a_faulty_client_sends_is_always_refused(chain, kind):
    faults = Faults(**{kind: 1.0})
    generator = torch.Generator().manual_seed(0)
    update = {"w": torch.randn(20, 10, generator=generator), "b": torch.randn(10, generator=generator)}
    codec = StateDictEncoder(CHAINS[chain], 50).bind(schema_of(update))
    for i in range(500 if kind == "damaged" else 100):
        message, _ = codec.encode(update, key(i))
        received = faults.uplink(message, key(i))
        assert received != message
        reason = {"nan": "NaN", "damaged": " ", "replayed": "round"}[kind]
        with pytest.raises(MessageError, match=reason):
            codec.decode(received, key(i))


def test_who_is_absent_or_crashes_or_is_late_sends_nothing():
    client = Client(5, lambda: Examples(torch.zeros(1), torch.zeros(1)), 1)
    assert Faults(crash=1.0).client(client, key(0)) is client
    with pytest.raises(ClientFailure, match="was absent") as failure:
        Faults(absent=1.0).client(client, key(0)).load()
    assert failure.value.kind == "silent"
    for kind, expected in (("crash", "silent"), ("late", "late")):
        with pytest.raises(ClientFailure) as failure:
            Faults(**{kind: 1.0}).uplink(b"message", key(0))
        assert failure.value.kind == expected
    assert Faults().uplink(b"message", key(0)) == b"message"


FAULTY = replace(RUN, rounds=6, clients_per_round=8, evaluate_every=3)


class Many(Noise):
    num_clients = 40


def run(faults: Faults, clients=None, min_clients: int = 1, **changes):
    process = FederatedAveraging(
        partial(MLP, 10),
        LocalTraining(lr=0.1),
        partial(torch.optim.SGD, lr=1.0),
        seed=RUN.seed,
        network=faults.uplink,
        min_clients=min_clients,
    )
    config = replace(FAULTY, min_clients=min_clients, **changes)

    def faulty(serial, numbers):
        return [faults.client(Many().client(n), Key(RUN.seed, serial, n)) for n in numbers]

    return list(rounds(process, process.initialize(), Many(), config, clients or faulty))


def test_a_run_goes_on_without_the_faulty_and_counts_them():
    faults = Faults(absent=0.1, crash=0.05, late=0.05, nan=0.05, damaged=0.05, replayed=0.05)
    outcome = run(faults)
    seen: Counter = Counter()
    for state, metrics in outcome:
        drawn = Counter(faults.drawn(Key(3, state.round - 1, int(n))) for n in cohort(3, state.round - 1, 40, 8))
        seen += drawn
        kinds = {
            "silent": drawn["absent"] + drawn["crash"],
            "late": drawn["late"],
            "refused": drawn["nan"] + drawn["damaged"] + drawn["replayed"],
            "outlier": 0,
            "unable": 0,
            "lost": 0,
        }
        assert {kind: metrics[f"clients_failed/{kind}"] for kind in kinds} == kinds
        assert metrics["clients"] == drawn[None] == 8 - metrics["clients_failed"]
        # every sent message is counted, also if it fails
        assert metrics["uploads"] == 8 - drawn["absent"] - drawn["crash"]
        assert metrics["aggregated_bits"] == metrics["uploads"] * metrics["broadcast_bits"] // 8  # all float32
        assert metrics["report_bits"] == metrics["uploads"] * 8 * REPORT
    assert len(seen) >= 5  # with this seed most faults occur

    # the model equals the model of a run that never draws the failed clients
    def good(serial, numbers):
        return [Many().client(n) for n in numbers if not faults.drawn(Key(3, serial, n))]

    honest = run(Faults(), good)
    for name, value in outcome[-1][0].weights.items():
        torch.testing.assert_close(value, honest[-1][0].weights[name], rtol=1e-5, atol=1e-6)


def test_a_round_with_too_few_is_repeated_with_another_cohort(caplog, tmp_path):
    faults = Faults(absent=0.4)
    good = [sum(faults.drawn(Key(3, s, int(n))) is None for n in cohort(3, s, 40, 8)) for s in range(40)]
    outcome = run(faults, min_clients=5, repeats=10)
    serials = [s for s in range(40) if good[s] >= 5][: FAULTY.rounds]  # the cohorts with enough answers
    assert serials != list(range(FAULTY.rounds))
    assert [metrics["clients"] for _, metrics in outcome] == [good[s] for s in serials]
    assert [metrics["round"] for _, metrics in outcome] == list(range(FAULTY.rounds))
    assert (
        sum(metrics["repeats"] for _, metrics in outcome) == outcome[-1][0].repeats == serials[-1] + 1 - FAULTY.rounds
    )
    message = outcome[0][1]["broadcast_bits"] // (8 * (outcome[0][1]["repeats"] + 1))
    for _, metrics in outcome:  # a round counts the bits of its failed cohorts
        assert metrics["broadcast_bits"] == message * 8 * (metrics["repeats"] + 1)
    assert sum(metrics["aggregated_bits"] for _, metrics in outcome) == outcome[-1][0].aggregated_bits
    assert sum(metrics["report_bits"] for _, metrics in outcome) == outcome[-1][0].reported_bits
    assert all(metrics["report_bits"] == metrics["uploads"] * 8 * REPORT for _, metrics in outcome)
    # a round also counts their failures and their time
    drops = [sum(faults.drawn(Key(3, s, int(n))) == "absent" for n in cohort(3, s, 40, 8)) for s in range(40)]
    ends = [-1, *serials]
    expected = [sum(drops[before + 1 : last + 1]) for before, last in itertools.pairwise(ends)]
    assert [metrics["clients_failed"] for _, metrics in outcome] == expected
    assert [metrics["clients_failed/silent"] for _, metrics in outcome] == expected
    for _, metrics in outcome:
        parts = sum(metrics[f"seconds/{phase}"] for phase in ("train", "encode", "decode", "aggregate", "evaluate"))
        assert 0.7 * metrics["seconds"] < parts <= metrics["seconds"]
    assert "repeated with another cohort" in caplog.text
    # without an encoder the same clients would receive and send as many bits
    summary = Summary(tmp_path)
    summary.start({"run": {"seed": 3, "clients_per_round": 8}}, message)
    for _, metrics in outcome:
        summary.write(metrics)
    assert summary.values["broadcast_ratio"] == summary.values["upload_ratio"] == 1.0


def test_repeats_have_an_end(caplog):
    with pytest.raises(TooFewClients, match="0 of 8 clients sent a usable update, the round needs 1; client"):
        run(Faults(crash=1.0), repeats=2)
    assert caplog.text.count("repeated with another cohort") == 2
