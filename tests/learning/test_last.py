"""Broadcasts as differences from what clients received last, against clients that keep it: reference=last."""

import random
from dataclasses import replace

import pytest
import torch

from fedq.data import Client
from fedq.encoding import Encoder, FixedWidth, Key, StateDictEncoder, UniformQuantization, schema_of
from fedq.learning import ClientFailure, TooFewClients
from fedq.simulation import checkpoint

LAST = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), reference="last")
EXACT = StateDictEncoder()


def cohorts(rounds):
    """Clients that come often, seldom, and late."""
    draw = random.Random(0)
    return [draw.sample(range(4), 2) + [10] * (r % 7 == 6) + [20 + r] * (r % 4 == 3) for r in range(rounds)]


class Follower:
    """A client as it would run elsewhere: it has only what it was sent, and the run's initial weights."""

    def __init__(self, initial):
        self.weights, self.serial, self.bytes = initial, 0, 0

    def catch_up(self, messages, base, schema):
        """Takes the shorter of all messages that it missed, or all weights before the last round's and its message."""
        missed = messages[self.serial : -1]
        if base is not None and sum(map(len, missed)) > len(base[1]):
            self.weights, _ = EXACT.decode(base[1], base[0], schema)
            self.bytes += len(base[1])
            missed, self.serial = [], len(messages) - 1
        for message in [*missed, messages[-1]]:
            key = Key(0, self.serial)
            self.weights, _ = LAST.decode(message, key, schema, {}, reference=self.weights)
            self.bytes += len(message)
            self.serial += 1


@pytest.fixture
def seen(monkeypatch):
    """What each round sent, what came before it exact, and what the cohort decoded."""
    rounds = []
    from fedq.learning.client_side import ClientSide

    contribute = ClientSide.contribute

    def recording(self, task, clients):
        share = contribute(self, task, clients)
        rounds.append((task, share.received))
        return share

    monkeypatch.setattr(ClientSide, "contribute", recording)
    return rounds


def test_each_client_gets_what_it_needs_and_it_is_counted(process, client, seen):
    averaging = process(broadcast=LAST)
    state = averaging.initialize()
    followers, schema = {}, schema_of(state.weights)
    initial, full_was_cheaper, messages_were_cheaper = state.weights, 0, 0
    for numbers in cohorts(16):
        state, metrics = averaging.next(state, [client(number) for number in numbers])
        messages = [task.message for task, _ in seen]
        task, received = seen[-1]
        before = sum(follower.bytes for follower in followers.values())
        for number in numbers:
            follower = followers.setdefault(number, Follower(initial))
            missed = sum(map(len, messages[follower.serial : -1]))
            full_was_cheaper += missed > len(task.base)
            messages_were_cheaper += 0 < missed < len(task.base)
            follower.catch_up(messages, (Key(0, task.round), task.base), schema)
            assert all(torch.equal(follower.weights[name], value) for name, value in received.items())
        sent = sum(follower.bytes for follower in followers.values()) - before
        assert metrics["broadcast_bits"] == 8 * sent
    # both ways of catching up occurred, and nobody who would be sent everything is remembered
    assert full_was_cheaper and messages_were_cheaper
    assert state.holders.keys() < followers.keys()


def test_what_clients_train_on_follows_the_servers_weights(process, client, seen):
    """The differences hold all errors before: the last error does not grow with the rounds, as it would without."""
    averaging, errors = process(broadcast=LAST), []
    state = averaging.initialize()
    for _ in range(10):
        before = state.weights
        state, _ = averaging.next(state, [client(number) for number in range(3)])
        task, received = seen[-1]
        errors.append(float((received["big.weight"] - before["big.weight"]).abs().max()))
        step = float(
            (before["big.weight"] - EXACT.decode(task.base, Key(0, task.round), averaging._schema)[0]["big.weight"])
            .abs()
            .max()
        )
        assert errors[-1] <= 2 * step / 255 + 1e-7
    assert errors[0] == 0


def test_a_restarted_server_goes_on_with_the_same_bytes(process, client, seen, tmp_path):
    def go_on(state, numbers):
        for cohort in numbers:
            state, _ = averaging.next(state, [client(number) for number in cohort])
        return state

    averaging, numbers = process(broadcast=LAST), cohorts(12)
    whole = go_on(averaging.initialize(), numbers)
    messages = [task.message for task, _ in seen]
    seen.clear()
    half = go_on(averaging.initialize(), numbers[:5])
    restored, _ = checkpoint.load(checkpoint.save(half, {}, tmp_path, 1))
    averaging = process(broadcast=LAST)
    again = go_on(restored, numbers[5:])
    assert [task.message for task, _ in seen] == messages
    assert again.broadcasted_bits == whole.broadcasted_bits and again.holders == whole.holders
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())


def test_who_did_not_answer_is_not_taken_to_have_received(process, client):
    def broken():
        raise ClientFailure("silent", "it dropped out")

    averaging = process(broadcast=LAST)
    state, _ = averaging.next(averaging.initialize(), [client(0), Client(1, broken)])
    assert state.holders == {0: 1}
    first = state.lengths[0]
    state, metrics = averaging.next(state, [client(0), client(1)])
    assert metrics["broadcast_bits"] == 8 * (2 * state.lengths[1] + first)
    # a cohort that did not answer leaves what everybody holds as it was
    with pytest.raises(TooFewClients) as caught:
        averaging.next(state, [Client(2, broken)])
    after = caught.value.state
    assert after == replace(state, repeats=1, broadcasted_bits=after.broadcasted_bits)
    assert after.broadcasted_bits > state.broadcasted_bits


def test_error_feedback_of_the_broadcast_tells_all_in_the_end(process, client, seen):
    """What was decoded over the rounds adds up to what was to be told, but for the last residual (Seide 2014)."""
    coarse = StateDictEncoder(Encoder([UniformQuantization(2, "nearest")], FixedWidth()), error_feedback=True)
    averaging = process(broadcast=coarse)
    state, told, decoded = averaging.initialize(), 0, 0
    for _ in range(6):
        told = told + state.weights["big.weight"].double()
        state, _ = averaging.next(state, [client(0), client(1)])
        decoded = decoded + seen[-1][1]["big.weight"].double()
    torch.testing.assert_close(decoded + state.residual["big.weight"].double(), told, rtol=0, atol=1e-5)
    assert state.residual.keys() == {"big.weight"}
    plain = process(broadcast=replace(coarse, error_feedback=False))
    state, total = plain.initialize(), 0
    for _ in range(6):
        total = total - state.weights["big.weight"].double()
        state, _ = plain.next(state, [client(0), client(1)])
        total = total + seen[-1][1]["big.weight"].double()
    assert float(total.norm()) > 2 * float((decoded - told).norm())


def test_what_does_not_fit_is_refused(process):
    with pytest.raises(ValueError, match="error_feedback"):
        StateDictEncoder(reference="last", error_feedback=True)
    with pytest.raises(ValueError, match="reference"):
        StateDictEncoder(reference="first")


def test_where_all_travels_exact_nobody_has_anything_to_catch_up_with(process, client):
    averaging = process(broadcast=replace(EXACT, reference="last"))
    state, bits = averaging.initialize(), []
    for number in range(3):
        state, metrics = averaging.next(state, [client(number + 1), client(0)])
        bits.append(metrics["broadcast_bits"])
    assert len(set(bits)) == 1
    assert not state.received and not state.lengths and not state.holders


def test_who_answers_a_cohort_in_vain_has_caught_up(process, client):
    averaging = process(broadcast=LAST, min_clients=2)
    state = averaging.initialize()
    for numbers in ([0, 1], [2, 3]):
        state, _ = averaging.next(state, [client(n) for n in numbers])
    missed = state.lengths[1]
    silent = Client(1, lambda: (_ for _ in ()).throw(ClientFailure("silent", "it dropped out")))
    with pytest.raises(TooFewClients) as caught:
        averaging.next(state, [client(0), silent])
    again = caught.value.state
    in_vain = again.broadcasted_bits - state.broadcasted_bits
    assert again.holders == state.holders | {0: 2}
    after, metrics = averaging.next(again, [client(0), client(1)])
    message = after.lengths[2]
    assert metrics["broadcast_bits"] == 8 * (2 * message + missed)  # client 1 alone is still behind
    assert in_vain == pytest.approx(8 * (2 * message + 2 * missed), abs=800)  # another key, nearly as many bytes
