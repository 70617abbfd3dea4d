import copy
import math
import re
import struct
import zlib
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fedq.data import Client, Examples
from fedq.encoding import (
    CABAC,
    AdaptiveEncodingStage,
    Codec,
    Encoded,
    EncodeError,
    Encoder,
    FixedWidth,
    Key,
    MessageError,
    Raw,
    StateDictEncoder,
    StateUpdate,
    StepQuantization,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.message import pack, peek, repacked
from fedq.errors import FedqError
from fedq.learning import (
    ClientFailure,
    Diverged,
    LocalTraining,
    Registered,
    TaskError,
    TooFewClients,
    TrainingMetrics,
    evaluate,
)
from fedq.learning.cohort import _longest_first
from fedq.simulation.workers import Workers

UINT8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def sent(monkeypatch):
    """Returns a list of (key, message) of all encoded weights and updates, without reports."""
    messages = []
    encode = Codec.encode

    def recording(self, tensors, key, *args, **kwargs):
        encoded = encode(self, tensors, key, *args, **kwargs)
        if "report/loss" not in tensors:
            messages.append((key, encoded.message))
        return encoded

    monkeypatch.setattr(Codec, "encode", recording)
    return messages


def test_a_float32_round_is_federated_averaging(process, client, tiny):
    """McMahan 2016, algorithm 1, implemented again without code of fedq.learning."""
    averaging = process(seed=5)
    start = averaging.initialize()
    sizes = {4: 50, 7: 20, 1: 33}
    state, metrics = averaging.next(start, [client(number, n) for number, n in sizes.items()])

    mean = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.weights.items()}
    for number, n in sizes.items():
        model = tiny()
        model.load_state_dict(start.weights)
        examples = client(number, n).load()
        order = torch.from_numpy(Key(5, 0, number).fold("train").fold("shuffle").fold("0").permutation(n))
        for i in range(0, n, 20):
            batch = order[i : i + 20]
            gradients = torch.autograd.grad(
                F.cross_entropy(model(examples.x[batch]), examples.y[batch]), list(model.parameters())
            )
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
        for name, value in model.state_dict().items():
            mean[name] += (value - start.weights[name]).double() * n / sum(sizes.values())
    for name, value in state.weights.items():
        torch.testing.assert_close(value, (start.weights[name] + mean[name]).float(), rtol=1e-5, atol=1e-6)
    assert metrics["clients"] == 3
    assert metrics["clients_failed"] == 0


def test_bits_are_those_of_the_messages(process, client, sent):
    averaging = process(broadcast=UINT8, upload=UINT8)
    state, metrics = averaging.next(averaging.initialize(), [client(i) for i in range(3)])
    (down,) = [message for key, message in sent if key.client == Key(0).client]
    up = [message for key, message in sent if key.client != Key(0).client]
    assert len(up) == 3
    assert metrics["broadcast_bits"] == 8 * len(down) * 3
    assert metrics["aggregated_bits"] == 8 * sum(map(len, up))
    state, metrics = averaging.next(state, [client(i) for i in range(2)])
    assert metrics["cumulative_broadcasted_bits"] == state.broadcasted_bits == 8 * len(down) * 5
    assert metrics["cumulative_aggregated_bits"] == state.aggregated_bits == 8 * sum(map(len, up)) // 3 * 5


REPORT = 48 + 4 * 8  # a frame, a loss and three counts


def test_bits_of_reports_are_counted_apart(process, client):
    arrived = []

    def network(message, key):
        arrived.append((key.client, len(message)))
        if key.client == 1:
            raise ClientFailure("late", "it came late")
        if key.client == 2:
            raise ClientFailure("silent", "it crashed")
        return message

    averaging = process(network=network, min_clients=2)
    state, metrics = averaging.next(averaging.initialize(), [client(number) for number in (0, 1, 2, 3, 4)])
    message = metrics["broadcast_bits"] // 40
    assert arrived == [
        (0, message),
        (0, REPORT),
        (1, message),
        (2, message),
        *[(n, m) for n in (3, 4) for m in (message, REPORT)],
    ]
    # the late client sent its answer
    assert (metrics["aggregated_bits"], metrics["report_bits"]) == (4 * 8 * message, 4 * 8 * REPORT)
    assert metrics["cumulative_reported_bits"] == state.reported_bits == 4 * 8 * REPORT
    with pytest.raises(TooFewClients) as caught:
        averaging.next(state, [client(0), client(1)])
    assert caught.value.state.reported_bits == 6 * 8 * REPORT
    state, metrics = averaging.next(caught.value.state, [client(0), client(3)])
    assert (metrics["report_bits"], metrics["cumulative_reported_bits"]) == (2 * 8 * REPORT, 8 * 8 * REPORT)
    assert state.reported_bits == 8 * 8 * REPORT


def reporting(forge):
    """A network that changes the report of client 1."""
    return lambda message, key: forge(message, key) if key.client == 1 and len(message) == REPORT else message


def claiming(loss=1.0, correct=3, seen=30, steps=2):
    """Replaces a report by a valid report of these numbers."""
    return lambda message, key: pack([struct.pack("<dqqq", loss, correct, seen, steps)], peek(message)[0], key)


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda message, key: message[:60] + bytes([message[60] ^ 4]) + message[61:], "the checksum does not fit"),
        (lambda message, key: message[:-1], "32 bytes of body, the message has 31"),
        (lambda message, key: message + b"0", "32 bytes of body, the message has 33"),
        (lambda message, key: b"", "a message has at least 48 bytes, this one 0"),
        (lambda message, key: repacked(message, key._replace(round=7)), "round 7, client 1; expected seed 0, round 0"),
        (
            lambda message, key: repacked(message, key._replace(client=0)),
            "client 0; expected seed 0, round 0, client 1",
        ),
        (lambda message, key: repacked(message, key._replace(seed=9)), "seed 9"),
        (claiming(correct=31), "no training gives the report"),
        (claiming(correct=-1), "no training gives the report"),
        (claiming(steps=0), "no training gives the report"),
        (claiming(steps=31), "no training gives the report"),
        (claiming(correct=0, seen=0, steps=0), "no training gives the report"),
        (claiming(correct=-5, seen=-3, steps=-4), "no training gives the report"),
        (claiming(seen=31), "no training gives the report"),
        (claiming(seen=10**6), "of 30 examples"),
        (claiming(seen=3), "no training gives the report"),
        (claiming(steps=1), "no training gives the report"),
        (claiming(steps=3), "no training gives the report"),
        (claiming(loss=-1.0), "no training gives the report"),
        (claiming(loss=math.nan), "tensor 'report/loss' cannot be decoded: a value is NaN or infinite"),
        (claiming(loss=math.inf), "tensor 'report/loss' cannot be decoded: a value is NaN or infinite"),
    ],
    ids=range(21),
)
def test_a_report_that_no_client_sends_is_refused_with_its_update(process, client, caplog, forge, reason):
    averaging, alone = process(network=reporting(forge)), process()
    state, metrics = averaging.next(averaging.initialize(), [client(0), client(1)])
    without, expected = alone.next(alone.initialize(), [client(0)])
    assert same(state.weights, without.weights)
    assert (metrics["clients"], metrics["clients_failed/refused"], metrics["uploads"]) == (1, 1, 2)
    assert [metrics[f"train/{name}"] for name in ("loss", "accuracy")] == [
        expected[f"train/{name}"] for name in ("loss", "accuracy")
    ]
    # its bytes were sent
    for name in ("aggregated_bits", "report_bits"):
        assert metrics[name] == 2 * expected[name]
    assert "client 1 is left out: " in caplog.text and reason in caplog.text


def test_a_client_without_examples_can_give_no_report(process):
    protocol, key = process().protocol, Key(0, 0, 1)
    with pytest.raises(MessageError, match="no training gives the report"):
        protocol.reports.read(
            protocol.reports.write(TrainingMetrics({"loss": 0.0, "correct": 0}, 0, 0), key), key, Registered(0, 0)
        )


def test_a_clients_weight_does_not_follow_its_report(process, client):
    honest, boasting = process(), process(network=reporting(claiming(30.0, 30)))
    clients = [client(0), client(1)]
    state, metrics = honest.next(honest.initialize(), clients)
    other, claimed = boasting.next(boasting.initialize(), clients)
    assert metrics["clients"] == claimed["clients"] == 2
    assert claimed["train/accuracy"] >= 0.5 > metrics["train/accuracy"]  # the server used the report
    assert same(state.weights, other.weights)


def test_what_was_decoded_from_the_messages_is_what_trained_the_model(process, client, sent, monkeypatch):
    """Fails if either side used the original tensors, because the decoded tensors differ."""
    started_from = []
    train = LocalTraining.train
    monkeypatch.setattr(
        LocalTraining,
        "train",
        lambda self, model, weights, *rest: (started_from.append(weights), train(self, model, weights, *rest))[1],
    )
    averaging = process(broadcast=UINT8, upload=UINT8)
    start = averaging.initialize()
    schema = schema_of(start.weights)
    sizes = {0: 30, 1: 45, 2: 10}
    state, _ = averaging.next(start, [client(number, n) for number, n in sizes.items()])

    messages = dict(sent)
    codec = UINT8.bind(schema)
    received, _ = codec.decode(messages[Key(0, 0)], Key(0, 0))
    assert not same(received, start.weights)
    assert all(same(weights, received) for weights in started_from)
    updates = {number: codec.decode(messages[Key(0, 0, number)], Key(0, 0, number)).tensors for number in sizes}
    for name, value in start.weights.items():
        mean = sum(updates[number][name].double() * n for number, n in sizes.items()) / sum(sizes.values())
        torch.testing.assert_close(state.weights[name], (value + mean).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", ["broadcast", "upload"])
def test_one_changed_symbol_changes_the_model(process, client, monkeypatch, direction):
    averaging = process(broadcast=UINT8, upload=UINT8)
    start = averaging.initialize()
    clean, _ = averaging.next(start, [client(0), client(1)])
    encode = Codec.encode

    def tampering(self, tensors, key, *args, **kwargs):
        message, reports = encode(self, tensors, key, *args, **kwargs)
        if tensors.keys() == start.weights.keys() and (key.client == 1) == (direction == "upload"):
            body = bytearray(message[:-4])
            body[44 + 8 + 1000] ^= 0x80  # a symbol of the first tensor, after its minimum and maximum
            message = bytes(body) + struct.pack("<I", zlib.crc32(body))
        return Encoded(message, reports)

    monkeypatch.setattr(Codec, "encode", tampering)
    tampered, metrics = averaging.next(start, [client(0), client(1)])
    assert metrics["clients_failed"] == 0
    changed = clean.weights["big.weight"] != tampered.weights["big.weight"]
    assert changed.sum() == 1 if direction == "upload" else changed.sum() > 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_number_of_workers_changes_nothing(process, client, count):
    clients = [client(i, 20 + i) for i in range(7)]

    def three_rounds(**more):
        averaging = process(broadcast=UINT8, upload=UINT8, server=partial(torch.optim.Adam, lr=0.01), **more)
        state = averaging.initialize()
        for _ in range(3):
            state, metrics = averaging.next(state, clients)
        return state, metrics

    alone, metrics = three_rounds()
    with Workers(count) as workers:
        state, others = three_rounds(map=workers.map)
    assert same(alone.weights, state.weights)
    assert {k: v for k, v in metrics.items() if "seconds" not in k} == {
        k: v for k, v in others.items() if "seconds" not in k
    }


def test_a_step_is_pure(process, client):
    averaging = process(broadcast=UINT8, upload=UINT8, server=partial(torch.optim.SGD, lr=1.0, momentum=0.9))
    state, _ = averaging.next(averaging.initialize(), [client(0), client(1)])
    before = copy.deepcopy(state)
    once, _ = averaging.next(state, [client(2), client(3)])
    twice, _ = averaging.next(state, [client(2), client(3)])
    assert same(once.weights, twice.weights)
    assert same(state.weights, before.weights)
    assert torch.equal(state.optimizer["state"][0]["momentum_buffer"], before.optimizer["state"][0]["momentum_buffer"])


def test_seeds_differ_and_the_global_generator_is_left_alone(process):
    before = torch.random.get_rng_state()
    a, b, c = (process(seed=seed).initialize().weights for seed in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


def test_batch_norm_statistics_are_averaged_and_its_counter_stays_an_integer(process, client, normalised):
    averaging = process(model=normalised)
    start = averaging.initialize()
    state, _ = averaging.next(start, [client(0, 60), client(1, 20)])
    assert state.weights["norm.num_batches_tracked"].dtype == torch.int64
    assert int(state.weights["norm.num_batches_tracked"]) == 3  # 3 and 1 batches: (3·60 + 1·20) / 80 = 2.5, rounded up
    alone = [
        averaging.next(start, [client(number, n)])[0].weights["norm.running_mean"] for number, n in ((0, 60), (1, 20))
    ]
    torch.testing.assert_close(state.weights["norm.running_mean"], (alone[0] * 60 + alone[1] * 20) / 80)


def failing(number, examples):
    return Client(number, lambda: examples)


EMPTY = Examples(torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.int64))
POISON = Examples(torch.full((20, 1, 28, 28), float("nan")), torch.zeros(20, dtype=torch.int64))


@pytest.mark.parametrize(("examples", "reason"), [(EMPTY, "no examples"), (POISON, "holds NaN")])
def test_a_client_that_fails_is_left_out_with_its_weight(process, client, caplog, examples, reason):
    averaging = process()
    start = averaging.initialize()
    with_it, metrics = averaging.next(start, [client(0), failing(9, examples), client(1, 40)])
    without, _ = averaging.next(start, [client(0), client(1, 40)])
    for name, value in with_it.weights.items():
        torch.testing.assert_close(value, without.weights[name], rtol=1e-6, atol=1e-7)
    assert (metrics["clients"], metrics["clients_failed"], metrics["uploads"]) == (2, 1, 2)
    assert "client 9 is left out" in caplog.text
    assert reason in caplog.text
    # the failed client received the broadcast
    assert with_it.broadcasted_bits == without.broadcasted_bits // 2 * 3


def test_a_client_with_one_example_takes_part(process, client):
    averaging = process()
    state, metrics = averaging.next(averaging.initialize(), [client(0, 1)])
    assert metrics["clients"] == 1
    assert not same(state.weights, averaging.initialize().weights)


def test_a_damaged_message_is_counted_and_left_out(process, client, monkeypatch):
    averaging = process()
    encode = Codec.encode

    def damaging(self, tensors, key, *args, **kwargs):
        message, reports = encode(self, tensors, key, *args, **kwargs)
        damaged = key.client == 1 and "big.weight" in tensors
        return Encoded(message[:-5] + b"\x00" + message[-4:] if damaged else message, reports)

    clean, _ = averaging.next(averaging.initialize(), [client(0)])
    monkeypatch.setattr(Codec, "encode", damaging)
    state, metrics = averaging.next(averaging.initialize(), [client(0), client(1)])
    assert same(state.weights, clean.weights)
    assert (metrics["clients_failed"], metrics["uploads"]) == (1, 2)  # its bytes were sent


def test_an_update_beyond_float32_is_its_clients_and_not_the_runs(process, client, monkeypatch, caplog):
    """3e38 is finite, but times the client's 30 examples it overflows."""
    averaging = process()
    encode = Codec.encode

    def huge(self, tensors, key, *args, **kwargs):
        if key.client == 1 and "small.bias" in tensors:
            tensors = {**tensors, "small.bias": torch.full((10,), 3e38)}
        return encode(self, tensors, key, *args, **kwargs)

    clean, _ = averaging.next(averaging.initialize(), [client(0)])
    monkeypatch.setattr(Codec, "encode", huge)
    state, metrics = averaging.next(averaging.initialize(), [client(0), client(1)])
    assert same(state.weights, clean.weights)
    assert (metrics["clients_failed/refused"], metrics["uploads"]) == (1, 2)
    assert "client 1 is left out: tensor 'small.bias' times 30 overflows torch.float32" in caplog.text


def test_too_few_clients_are_an_error_that_says_why(process, client):
    averaging = process(min_clients=2)
    with pytest.raises(
        TooFewClients, match=r"round 1: 1 of 2 clients .* the round needs 2; client 9: it has no examples"
    ):
        averaging.next(averaging.initialize(), [client(0), failing(9, EMPTY)])
    with pytest.raises(TooFewClients, match="0 of 0"):
        averaging.next(averaging.initialize(), [])


def test_weights_that_are_no_numbers_are_not_sent(process, client):
    averaging = process()
    state = averaging.initialize()
    weights = state.weights | {"big.bias": torch.full((16,), float("inf"))}
    with pytest.raises(Diverged, match=r"round 1: tensor 'big.bias' holds NaN or infinity"):
        averaging.next(replace(state, weights=weights), [client(0)])


def test_another_rounds_message_is_refused(process, client, sent):
    averaging = process()
    state, _ = averaging.next(averaging.initialize(), [client(0)])
    key, message = sent[1]
    with pytest.raises(MessageError, match="round 0, client 0; expected seed 0, round 1, client 0"):
        StateDictEncoder().bind(schema_of(state.weights)).decode(message, key._replace(round=1))


def test_evaluation_is_the_mean_over_all_examples(process, client, tiny):
    averaging = process()
    state, examples = averaging.initialize(), client(3, 57).load()
    model = tiny()
    model.load_state_dict(state.weights)
    loss = float(F.cross_entropy(model(examples.x), examples.y).detach())
    accuracy = float((model(examples.x).argmax(1) == examples.y).double().mean())
    for size in (10, 57, 500):
        result = averaging.evaluate(state, examples, size)
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["accuracy"] == accuracy
    assert evaluate(model, examples)["accuracy"] == accuracy


@dataclass(frozen=True)
class PlusOneOverN(AdaptiveEncodingStage):
    """Adds 1/n in round n, and reports every client's largest value."""

    def initial_state(self, spec):
        return {"n": torch.tensor(1.0), "largest": torch.tensor(0.0)}

    def params(self, state):
        return {"n": state["n"]}

    def update_spec(self, spec):
        return {"largest": StateUpdate(TensorSpec((), torch.float32), "max")}

    def encode(self, x, key, params):
        return x + 1 / params["n"], {}, {"largest": x.max()}

    def decode(self, y, side, spec, key, params):
        return y - 1 / params["n"]

    def update_state(self, state, aggregated):
        return {"n": state["n"] + 1, "largest": aggregated["largest"]}


def test_an_adaptive_stage_learns_over_rounds_and_its_bytes_are_counted(process, client, sent):
    adaptive = StateDictEncoder(Encoder([PlusOneOverN()], Raw()))
    plain, learning = process(), process(broadcast=adaptive, upload=adaptive)
    state, plain_metrics = plain.next(plain.initialize(), [client(0), client(1)])
    adapted, metrics = learning.next(learning.initialize(), [client(0), client(1)])
    # one float of params for each direction down; one float of state update up
    assert metrics["broadcast_bits"] - plain_metrics["broadcast_bits"] == 2 * 2 * 32
    assert metrics["aggregated_bits"] - plain_metrics["aggregated_bits"] == 2 * 32
    for name, value in state.weights.items():
        torch.testing.assert_close(adapted.weights[name], value, atol=1e-5, rtol=1e-5)
    assert float(adapted.upload["big.weight/0/n"]) == 2.0
    assert 0 < float(adapted.upload["big.weight/0/largest"]) < 1
    assert float(adapted.broadcast["big.weight/0/n"]) == 2.0
    again, _ = learning.next(adapted, [client(2)])
    assert float(again.upload["big.weight/0/n"]) == 3.0


def test_errors_of_encoding_name_the_tensor():
    with pytest.raises(EncodeError, match=r"tensor 'w' holds NaN"):
        StateDictEncoder().bind({"w": TensorSpec((2,), torch.float32)}).encode(
            {"w": torch.tensor([1.0, float("nan")])}, Key(0)
        )


def test_of_each_few_clients_the_largest_start_first_and_keep_their_places():
    sizes = [3, 50, 7] + [1] * 13 + [9, 90]  # the last two are in the second window
    placed = [(place, Client(100 + place, lambda: EMPTY, size)) for place, size in enumerate(sizes)]
    order = list(_longest_first(iter(placed)))
    assert [place for place, _ in order] == [1, 2, 0, *range(3, 16), 17, 16]
    assert all(client.number == 100 + place for place, client in order)


STEPS = Encoder([StepQuantization(0.5, relative=False, rate_weight=0.1)], CABAC())
FROM_INITIAL = StateDictEncoder(STEPS, 100, common_scale=True, reference="initial")
DIFFERENCES = replace(FROM_INITIAL, reference="none")


def test_clients_train_on_the_initial_weights_and_the_decoded_difference(process, client, sent, monkeypatch):
    started_from = []
    train = LocalTraining.train
    monkeypatch.setattr(
        LocalTraining,
        "train",
        lambda self, model, weights, *rest: (started_from.append(weights), train(self, model, weights, *rest))[1],
    )
    averaging = process(broadcast=FROM_INITIAL, upload=DIFFERENCES, seed=3)
    state = averaging.initialize()
    start, schema = {k: v.clone() for k, v in state.weights.items()}, schema_of(state.weights)
    from_initial, alone = FROM_INITIAL.bind(schema), DIFFERENCES.bind(schema)
    for number in range(3):
        before = {k: v.clone() for k, v in state.weights.items()}
        sent.clear(), started_from.clear()
        state, metrics = averaging.next(state, [client(i) for i in range(2)])
        (key, message), *_ = sent
        assert metrics["broadcast_bits"] == 8 * len(message) * 2
        received, _ = from_initial.decode(message, key, reference=start)
        assert all(same(weights, received) for weights in started_from) and len(started_from) == 2
        # the same bytes by hand, of the difference alone
        difference = {k: before[k] - start[k] if v.numel() > 100 else before[k] for k, v in before.items()}
        own, _ = alone.encode(difference, key)
        assert own[44:-4] == message[44:-4]
        decoded, _ = alone.decode(own, key)
        for name, value in received.items():
            expected = start[name] + decoded[name] if value.numel() > 100 else before[name]
            assert torch.equal(value, expected)
        if number == 0:  # only zeros, and the small tensors exact
            assert same(received, start) and len(message) < 48 + 4 + 8 * 4 + 4 * 40
        else:
            assert not same(received, start) and not same(received, before)


def test_a_resumed_run_from_a_reference_ends_in_the_same_bytes(process, client, sent):
    def rounds(averaging, state, count):
        for _ in range(count):
            state, _ = averaging.next(state, [client(i) for i in range(2)])
        return state

    build = partial(process, broadcast=FROM_INITIAL, upload=DIFFERENCES, seed=3)
    averaging = build()
    whole = rounds(averaging, averaging.initialize(), 3)
    messages = [message for _, message in sent]
    sent.clear()
    first = build()
    saved = copy.deepcopy(rounds(first, first.initialize(), 1))
    resumed = rounds(build(), saved, 2)  # another process knows the initial weights by the seed
    assert same(resumed.weights, whole.weights)
    assert [message for _, message in sent] == messages
    assert resumed.broadcasted_bits == whole.broadcasted_bits


def test_references_that_there_are_not_are_refused_at_once(process):
    for reference in ("initial", "last"):
        with pytest.raises(FedqError, match="upload.reference must be none"):
            process(upload=StateDictEncoder(STEPS, reference=reference))


@pytest.mark.parametrize("rules", [{"dnse*": Encoder()}, {"*": Encoder(), "dense2.bias": Encoder()}], ids=str)
def test_a_rule_that_no_tensor_follows_is_refused(process, rules):
    """A misspelt rule would otherwise measure another chain."""
    with pytest.raises(
        FedqError, match=rf"encoder\.upload\.rules: no tensor follows '{re.escape([*rules][-1])}': no name fits it"
    ):
        process(upload=StateDictEncoder(rules=rules))


def test_a_clients_weight_is_what_it_trains_on(process, client):
    """With `max_examples`, a client's weight may be smaller than its number of examples."""
    averaging = process(client=LocalTraining(lr=0.1, max_examples=10))
    state = averaging.initialize()
    few, many = client(0, 10), client(1, 50)
    alone = [averaging.next(state, [one])[0].weights for one in (few, many)]
    both = averaging.next(state, [few, many])[0].weights
    for name, value in both.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)


def test_clients_that_fail_alike_are_one_line(process, client, caplog):
    averaging = process(network=lambda message, key: message[:-1] if key.client else message)
    averaging.next(averaging.initialize(), [client(i) for i in range(4)])
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("round 1: client 1 and 2 more are left out: the header says")


@pytest.mark.parametrize("kind", [tuple, list])
def test_examples_may_be_any_two_tensors(process, client, kind):
    averaging, plain = process(), client(0)
    pair = replace(plain, load=lambda: kind(plain.load()))
    states = [averaging.next(averaging.initialize(), [one])[0] for one in (plain, pair)]
    assert all(torch.equal(value, states[1].weights[name]) for name, value in states[0].weights.items())
    first, second = (averaging.evaluate(states[0], one.load()) for one in (plain, pair))
    assert first == second
    assert averaging.evaluate_clients(states[0], [pair]) == averaging.evaluate_clients(states[0], [plain])


@pytest.mark.parametrize(
    ("examples", "error"),
    [
        (None, "examples must be two tensors of shape (N, …), not a NoneType"),
        ((torch.zeros(3, 784),) * 3, "examples must be two tensors of shape (N, …), not a tuple"),
        ((torch.zeros(3, 784), torch.tensor(1)), "examples must be two tensors of shape (N, …), not Tensor and Tensor"),
    ],
)
def test_what_is_not_two_tensors_is_the_datasets_fault(process, client, examples, error):
    averaging = process()
    with pytest.raises(TaskError, match=re.escape(f"with the examples of client 0: {error}")):
        averaging.next(averaging.initialize(), [replace(client(0), load=lambda: examples)])


def test_gradients_do_not_reach_the_dataset(process, client):
    x, y = client(0).load()
    x.requires_grad_()
    averaging = process()
    _, metrics = averaging.next(averaging.initialize(), [Client(0, lambda: Examples(x * 1, y))])
    assert metrics["clients"] == 1
    averaging.next(averaging.initialize(), [Client(0, lambda: Examples(x, y))])
    assert x.grad is None


def test_a_failures_reason_is_one_line(process, client, caplog):
    def load():
        raise ValueError("no such file\nand many more lines")

    averaging = process()
    averaging.next(averaging.initialize(), [client(0), replace(client(1), load=load)])
    assert "client 1 is left out: ValueError: no such file" in caplog.text
    assert "many more lines" not in caplog.text
