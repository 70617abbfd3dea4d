"""reference=last: broadcasts are differences from the weights that clients received last, and clients keep these."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedq.data import Client
from fedq.encoding import Encoder, FixedWidth, Key, MessageError, StateDictEncoder, UniformQuantization
from fedq.learning import ClientFailure, ClientRecord, ErrorFeedback, TooFewClients
from fedq.learning.cohort import Cohort
from fedq.simulation import checkpoint

LAST = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), reference="last")
EXACT = StateDictEncoder()


def cohorts(rounds):
    """Returns cohorts in which clients take part often, seldom, or late."""
    draw = random.Random(0)
    return [draw.sample(range(4), 2) + [10] * (r % 7 == 6) + [20 + r] * (r % 4 == 3) for r in range(rounds)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Follower:
    """A client as it would run elsewhere: it has only received messages, and the run's initial weights."""

    def __init__(self):
        self.serial, self.bytes, self.held = 0, 0, ()

    def receive(self, process, broadcast, number):
        """Decodes the server's messages to this client; returns the weights."""
        messages = process.downlink.messages(broadcast, number)
        received = process.protocol.receive(messages, self.held)
        self.held = (received.weights, received.reference)
        self.bytes += sum(map(len, messages))
        return received.weights


@pytest.fixture
def seen(monkeypatch):
    """Returns a list of each round's broadcast and the weights that the cohort decoded."""
    rounds = []
    contribute = Cohort.contribute

    def recording(self, broadcast, clients, agree):
        result = contribute(self, broadcast, clients, agree)
        rounds.append((broadcast, result.received))
        return result

    monkeypatch.setattr(Cohort, "contribute", recording)
    return rounds


def test_each_client_gets_what_it_needs_and_it_is_counted(process, client, seen):
    averaging = process(broadcast=LAST)
    state = averaging.initialize()
    followers = {}
    full_was_cheaper, messages_were_cheaper = 0, 0
    for numbers in cohorts(16):
        state, metrics = averaging.next(state, [client(number) for number in numbers])
        messages = [message for broadcast, _ in seen for message in broadcast.messages]
        broadcast, received = seen[-1]
        before = sum(follower.bytes for follower in followers.values())
        for number in numbers:
            follower = followers.setdefault(number, Follower())
            # the client receives the missed messages, or (if shorter) all weights before the last round and the last
            # message
            missed = messages[follower.serial : -1]
            full = sum(map(len, missed)) >= len(broadcast.all_at_once)
            full_was_cheaper += full
            messages_were_cheaper += not full and bool(missed)
            expected = [broadcast.all_at_once] if full else missed
            assert averaging.downlink.messages(broadcast, number) == [*expected, messages[-1]]
            assert same(follower.receive(averaging, broadcast, number), received)
            follower.serial = len(messages)
        sent = sum(follower.bytes for follower in followers.values()) - before
        assert metrics["broadcast_bits"] == 8 * sent
        assert sum(map(len, state.kept)) < len(broadcast.all_at_once)
    # both ways to catch up occurred, and the server forgets clients that would receive all weights
    assert full_was_cheaper and messages_were_cheaper
    assert state.last_received.keys() < followers.keys()


def test_what_clients_train_on_follows_the_servers_weights(process, client, seen):
    """A difference includes all earlier errors, so the error does not grow with the rounds."""
    averaging, errors = process(broadcast=LAST), []
    state = averaging.initialize()
    for _ in range(10):
        before = state.weights
        state, _ = averaging.next(state, [client(number) for number in range(3)])
        broadcast, received = seen[-1]
        errors.append(float((received["big.weight"] - before["big.weight"]).abs().max()))
        reference, _ = averaging.protocol.exact.decode(broadcast.all_at_once, Key(0, broadcast.attempt))
        step = float((before["big.weight"] - reference["big.weight"]).abs().max())
        assert errors[-1] <= 2 * step / 255 + 1e-7
    assert errors[0] == 0


def test_a_restarted_server_goes_on_with_the_same_bytes(process, client, seen, tmp_path):
    def go_on(state, numbers):
        for cohort in numbers:
            state, _ = averaging.next(state, [client(number) for number in cohort])
        return state

    averaging, numbers = process(broadcast=LAST), cohorts(12)
    whole = go_on(averaging.initialize(), numbers)
    messages = [broadcast.messages for broadcast, _ in seen]
    seen.clear()
    half = go_on(averaging.initialize(), numbers[:5])
    restored, _ = checkpoint.load(checkpoint.save(half, {}, tmp_path, 1))
    averaging = process(broadcast=LAST)
    again = go_on(restored, numbers[5:])
    assert [broadcast.messages for broadcast, _ in seen] == messages
    assert again.broadcasted_bits == whole.broadcasted_bits and again.last_received == whole.last_received
    assert same(again.weights, whole.weights) and same(again.received, whole.received)
    assert all(torch.equal(*both) for both in zip(again.kept, whole.kept, strict=True))


def test_who_did_not_answer_is_not_taken_to_have_received(process, client):
    def broken():
        raise ClientFailure("silent", "it dropped out")

    averaging = process(broadcast=LAST)
    state, _ = averaging.next(averaging.initialize(), [client(0), Client(1, broken)])
    assert state.last_received == {0: 1}
    first = len(state.kept[0])
    state, metrics = averaging.next(state, [client(0), client(1)])
    assert metrics["broadcast_bits"] == 8 * (2 * len(state.kept[1]) + first)
    # a cohort that does not answer changes no client's weights
    with pytest.raises(TooFewClients) as caught:
        averaging.next(state, [Client(2, broken)])
    after = caught.value.state
    assert after == replace(state, repeats=1, broadcasted_bits=after.broadcasted_bits)
    assert after.broadcasted_bits > state.broadcasted_bits


def test_error_feedback_of_the_broadcast_tells_all_in_the_end(process, client, seen):
    """The decoded differences add up to the exact difference, except for the last residual (Seide 2014)."""
    coarse = StateDictEncoder(Encoder([UniformQuantization(2, "nearest")], FixedWidth()))
    averaging = process(broadcast=ErrorFeedback(coarse))
    state, told, decoded = averaging.initialize(), 0, 0
    for _ in range(6):
        told = told + state.weights["big.weight"].double()
        state, _ = averaging.next(state, [client(0), client(1)])
        decoded = decoded + seen[-1][1]["big.weight"].double()
    torch.testing.assert_close(decoded + state.residual["big.weight"].double(), told, rtol=0, atol=1e-5)
    assert state.residual.keys() == {"big.weight"}
    plain = process(broadcast=coarse)
    state, total = plain.initialize(), 0
    for _ in range(6):
        total = total - state.weights["big.weight"].double()
        state, _ = plain.next(state, [client(0), client(1)])
        total = total + seen[-1][1]["big.weight"].double()
    assert float(total.norm()) > 2 * float((decoded - told).norm())


def test_what_does_not_fit_is_refused(process):
    with pytest.raises(ValueError, match="error_feedback must be false with reference=last"):
        ErrorFeedback(StateDictEncoder(reference="last"))
    with pytest.raises(ValueError, match="reference must be none, initial or last"):
        StateDictEncoder(reference="first")


def test_where_all_travels_exact_nobody_has_anything_to_catch_up_with(process, client):
    averaging = process(broadcast=replace(EXACT, reference="last"))
    state, bits = averaging.initialize(), []
    for number in range(3):
        state, metrics = averaging.next(state, [client(number + 1), client(0)])
        bits.append(metrics["broadcast_bits"])
    assert len(set(bits)) == 1
    assert not state.received and not state.kept and not state.last_received


def test_who_answers_a_cohort_in_vain_has_caught_up(process, client):
    averaging = process(broadcast=LAST, min_clients=2)
    state = averaging.initialize()
    for numbers in ([0, 1], [2, 3]):
        state, _ = averaging.next(state, [client(n) for n in numbers])
    missed = len(state.kept[1])
    silent = Client(1, lambda: (_ for _ in ()).throw(ClientFailure("silent", "it dropped out")))
    with pytest.raises(TooFewClients) as caught:
        averaging.next(state, [client(0), silent])
    again = caught.value.state
    in_vain = again.broadcasted_bits - state.broadcasted_bits
    assert again.last_received == state.last_received | {0: 2}
    after, metrics = averaging.next(again, [client(0), client(1)])
    message = len(after.kept[2])
    assert metrics["broadcast_bits"] == 8 * (2 * message + missed)  # only client 1 still misses a message
    assert in_vain == pytest.approx(8 * (2 * message + 2 * missed), abs=800)  # another key gives nearly as many bytes


def silent():
    raise ClientFailure("silent", "it dropped out")


def test_clients_decode_what_they_are_sent_whatever_became_of_their_answers(process, client, seen):
    """Clients are absent, answer late, and answer repeated cohorts. Each has only its received messages."""
    draw, late = random.Random(2), set()

    def network(message, key):
        if key.client in late:
            raise ClientFailure("late", "it came late")
        return message

    averaging = process(broadcast=LAST, network=network, min_clients=2)
    state, followers, sent = averaging.initialize(), {number: Follower() for number in range(7)}, []
    for _ in range(40):
        numbers = draw.sample(range(7), 3)
        absent = {number for number in numbers if draw.random() < 0.15}
        late.clear()
        late.update(number for number in numbers if draw.random() < 0.3)
        try:
            state, _ = averaging.next(state, [Client(n, silent) if n in absent else client(n) for n in numbers])
        except TooFewClients as error:
            state = error.state
        broadcast, received = seen[-1]
        for number in sorted({*numbers} - absent):
            sent.append(averaging.downlink.messages(broadcast, number))
            assert same(followers[number].receive(averaging, broadcast, number), received)
    assert state.repeats > 5 and state.round > 15
    assert {len(messages) for messages in sent} >= {1, 2, 3}
    assert any(averaging.protocol.exact.expects(messages[0], {}) for messages in sent)


def apart(averaging, followers, broadcast, clients):
    """Lets each client receive alone. Records clients that cannot, and lets the others answer."""
    result = averaging.contribute(broadcast, [])
    for place, one in enumerate(clients):
        try:
            followers[one.number].receive(averaging, broadcast, one.number)
        except ClientFailure as failure:
            result.records[place] = ClientRecord(one.number, failure.kind, str(failure))
            result.sums.add(place, None)
        else:
            part = averaging.contribute(broadcast, [(place, one)])
            result.sums.add(place, part.sums.result())
            result.records |= part.records
    return result


@pytest.mark.parametrize("enough", [1, 2])
@pytest.mark.parametrize("rounds", [2, 8])
def test_a_client_that_lost_its_store_says_so_and_is_sent_all_it_needs(process, client, seen, rounds, enough):
    averaging = process(broadcast=LAST, min_clients=enough)
    followers, clients = {0: Follower(), 1: Follower()}, [client(0), client(1)]
    gather, state = partial(apart, averaging, followers), averaging.initialize()
    for _ in range(rounds):
        state, metrics = averaging.next(state, clients, gather)
        assert metrics["clients_failed/lost"] == 0
    assert state.last_received == {0: rounds, 1: rounds}
    followers[0] = Follower()
    broadcast, _ = averaging.downlink.open(state, [0, 1])
    with pytest.raises(ClientFailure, match="it does not hold the weights that the broadcast builds on") as caught:
        averaging.protocol.receive(averaging.downlink.messages(broadcast, 0))
    assert caught.value.kind == "lost"
    if enough == 1:
        state, metrics = averaging.next(state, clients, gather)
        assert (metrics["clients_failed/lost"], metrics["clients"]) == (1, 1)
        assert state.last_received == {1: rounds + 1}
    else:
        with pytest.raises(TooFewClients, match="client 0: it does not hold the weights") as caught:
            averaging.next(state, clients, gather)
        state = caught.value.state
        assert (caught.value.counts["clients_failed/lost"], state.last_received) == (1, {1: rounds})
    kept = [bytes(message.numpy()) for message in state.kept]
    state, metrics = averaging.next(state, clients, gather)
    broadcast, received = seen[-1]
    assert metrics["clients_failed/lost"] == 0 and state.last_received == {0: state.round, 1: state.round}
    assert same(followers[0].held[0], received) and same(followers[1].held[0], received)
    # all broadcasts since the initial weights if they are shorter, else all weights at once
    in_front = kept if rounds == 2 else [broadcast.all_at_once]
    assert averaging.downlink.messages(broadcast, 0) == [*in_front, *broadcast.messages]


def test_a_damaged_broadcast_is_not_decoded(process, client):
    averaging = process(broadcast=LAST)
    state = averaging.initialize()
    for _ in range(2):
        state, _ = averaging.next(state, [client(1)])
    broadcast, _ = averaging.downlink.open(state, [0])
    messages = averaging.downlink.messages(broadcast, 0)
    receive = averaging.protocol.receive
    assert len(messages) == 3 and receive(messages).attempt == 2
    for place, message in enumerate(messages):
        for bit in range(0, 8 * len(message), 1009):
            damaged = bytearray(message)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises((MessageError, ClientFailure)):
                receive([*messages[:place], bytes(damaged), *messages[place + 1 :]])
        for length in (0, 47, len(message) - 1):
            with pytest.raises((MessageError, ClientFailure)):
                receive([*messages[:place], message[:length], *messages[place + 1 :]])
    with pytest.raises(MessageError, match="a broadcast has 1 messages, this one 0"):
        receive([])
    exact = averaging.protocol.exact.encode(averaging.protocol.initial, Key(0, 2)).message
    with pytest.raises(ClientFailure, match="does not hold the weights"):  # a round's own broadcast is never exact
        receive([exact])
    with pytest.raises(MessageError, match="a broadcast has 1 messages, this one 2"):
        process().protocol.receive(messages[:2])
    with pytest.raises(ClientFailure, match="it does not hold the weights"):
        process(broadcast=LAST, seed=1).protocol.receive(messages)
