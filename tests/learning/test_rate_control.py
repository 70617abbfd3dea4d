import math
from functools import partial

import pytest
import torch

from fedq.encoding import (
    ANS,
    BitBudget,
    Encoder,
    FollowLoss,
    Key,
    StateDictEncoder,
    StepQuantization,
    schema_of,
)
from fedq.encoding.state_dict import RATE_CONTROL, flatten
from fedq.errors import FedqError

STEP = Encoder([StepQuantization(1.0, relative=False)], ANS())


def round_of(encoder, tensors, state, serial, clients=3, loss=None):
    """Encodes and decodes as a cohort does; returns the messages' bytes and the next state."""
    schema, total, lengths = schema_of(tensors), None, []
    for client in range(clients):
        params = encoder.params(schema, state)
        message, _ = encoder.encode(tensors, Key(0, serial, client), params, report=True, loss=loss)
        _, reports = encoder.decode(
            message, Key(0, serial, client), schema, params, attached=encoder.update_spec(schema)
        )
        own = encoder.report(schema, reports)
        total = own if total is None else encoder.combine(schema, total, own)
        lengths.append(len(message))
    return lengths, encoder.update_state(schema, state, total)


@pytest.mark.parametrize("bits", [0.2, 1.0, 3.0])
def test_messages_come_to_take_the_budget(bits):
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(300, 100, generator=generator), "b": 5 * torch.randn(20_000, generator=generator)}
    encoder = StateDictEncoder(STEP, 0, common_scale=True, rate_control=BitBudget(bits))
    state = encoder.initial_state(schema_of(tensors))
    for serial in range(12):
        # the tensors grow, as weights that move away from their first values do
        lengths, state = round_of(encoder, {n: t * 1.1**serial for n, t in tensors.items()}, state, serial)
    assert all(8 * length / 50_000 == pytest.approx(bits, rel=0.05) for length in lengths)


def test_the_budget_goes_where_it_reduces_the_error_most():
    """Reverse water-filling (Cover and Thomas 2006, §10.3): equal squared errors for an element of either tensor."""
    generator = torch.Generator().manual_seed(1)
    tensors = {"a": torch.randn(50_000, generator=generator), "b": 16 * torch.randn(50_000, generator=generator)}
    encoder = StateDictEncoder(STEP, 0, common_scale=True, rate_control=BitBudget(4.0))
    schema = schema_of(tensors)
    state = encoder.initial_state(schema)
    for serial in range(8):
        _, state = round_of(encoder, tensors, state, serial)
    params = encoder.params(schema, state)
    message, _ = encoder.encode(tensors, Key(0), params)
    decoded, _ = encoder.decode(message, Key(0), schema, params)
    errors = [float((decoded[name] - tensors[name]).square().mean()) for name in tensors]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    # 4 bits both take: 2 more for the one and 2 fewer for the other than if alone, at 0.254 bits above Shannon's bound
    assert errors[0] == pytest.approx(16 * 2.0 ** (-2 * (4 - 0.254)), rel=0.1)


def test_a_stalling_loss_halves_the_steps():
    rate_control = FollowLoss(start=8.0, memory=0.5, patience=3)
    state, factors = rate_control.initial_state(None), []
    losses = [2.0, 1.5, 1.2, 1.0, 0.9, 0.9, 0.9, 0.95, 1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1]
    averages = []
    for loss in losses:
        state = rate_control.update_state(state, {"loss": torch.tensor([loss, loss, 50.0])})  # an outlier
        factors.append(float(state["factor"]))
        averages.append(loss if not averages else 0.5 * averages[-1] + 0.5 * loss)
    # by hand: the averages are lowest at number 6, and number 8 is the first that is above the one three before
    first = next(i for i in range(3, len(losses)) if averages[i] >= averages[i - 3])
    assert factors[: first + 1] == [8.0] * first + [4.0]
    # it goes on through a halving, as the averages here do, and three rounds later is held against the one there
    assert averages[first + 3] >= averages[first]
    assert factors[first + 1 :][:3] == [4.0] * 2 + [2.0]
    stalled = rate_control.initial_state(None)
    for loss in (1.0, 1.0, 1.0, 1.0, 5.0):
        stalled = rate_control.update_state(stalled, {"loss": torch.tensor([loss])})
    assert float(stalled["factor"]) == 4.0
    assert float(stalled["losses"][-1]) == 3.0  # half of 1 and half of 5
    assert factors[-1] == 1.0


@pytest.mark.parametrize(
    "rate_control", [FollowLoss(start=8, patience=1), FollowLoss(start=2, memory=0), BitBudget(1)], ids=str
)
def test_a_number_without_a_point_gives_the_same_params_in_every_round(rate_control):
    state = rate_control.initial_state(None)
    declared = schema_of(state)
    for loss in (2.0, 3.0, 4.0, 5.0):
        state = rate_control.update_state(state, {rate_control.reports: torch.tensor([loss])})
        assert schema_of(state) == declared


def test_reports_that_cannot_be_are_not_believed():
    for rate_control in (BitBudget(1.0), FollowLoss()):
        state = rate_control.initial_state(None)
        bad = torch.tensor([0.0, -1.0])
        assert rate_control.update_state(state, {rate_control.reports: bad}) is state
        after = rate_control.update_state(state, {rate_control.reports: torch.tensor([0.0, 2.0, 2.0])})
        assert math.isfinite(float(after["factor"]))
    state = BitBudget(1.0).initial_state(None)
    for _ in range(30):
        state = BitBudget(1.0).update_state(state, {"bits": torch.tensor([9.0])})
    assert float(state["factor"]) == 2.0**20


def test_nothing_is_learnt_of_a_message_that_is_all_zero():
    """As the first broadcast is, where it is the difference from initial weights: it takes few bits at any step."""
    zeros, encoder = (
        {"a": torch.zeros(300, 100)},
        StateDictEncoder(STEP, 0, common_scale=True, rate_control=BitBudget(1.0)),
    )
    initial = encoder.initial_state(schema_of(zeros))
    _, state = round_of(encoder, zeros, initial, 0)
    assert flatten(state).keys() == flatten(initial).keys()
    assert all(torch.equal(value, flatten(initial)[path]) for path, value in flatten(state).items())


def test_a_pace_that_follows_the_loss_is_given_one():
    encoder = StateDictEncoder(STEP, 0, common_scale=True, rate_control=FollowLoss())
    tensors = {"a": torch.ones(3)}
    with pytest.raises(TypeError, match="loss="):
        encoder.encode(tensors, Key(0), encoder.params(schema_of(tensors), encoder.initial_state(schema_of(tensors))))
    with pytest.raises(TypeError, match="params="):
        encoder.encode(tensors, Key(0), loss=1.0)


def test_a_round_follows_both_paces_and_pays_for_them(process, client):
    chain = StateDictEncoder(STEP, 0, common_scale=True)
    paced = [
        StateDictEncoder(STEP, 0, common_scale=True, rate_control=rate_control)
        for rate_control in (BitBudget(0.5), FollowLoss(4.0))
    ]
    clients = [client(number) for number in range(3)]
    plain, with_pace = process(broadcast=chain, upload=chain), process(broadcast=paced[0], upload=paced[1])
    state = with_pace.initialize()
    assert flatten(state.upload).keys() == {f"{RATE_CONTROL}/0/factor", f"{RATE_CONTROL}/0/losses"}
    state, _ = with_pace.next(state, clients)
    _, metrics = plain.next(plain.initialize(), clients)
    # down, each client is sent two factors; the first broadcast is otherwise the same
    assert state.broadcasted_bits - metrics["broadcast_bits"] == 3 * 2 * 32
    state, first = with_pace.next(state, clients)
    assert float(state.broadcast[RATE_CONTROL][0]["factor"]) != 1.0
    assert float(state.upload[RATE_CONTROL][0]["losses"][-1]) == pytest.approx(first["train/loss"], rel=0.5)


def test_what_does_not_fit_together_is_refused(process):
    with pytest.raises(ValueError, match="common_scale"):
        StateDictEncoder(STEP, rate_control=BitBudget(1.0))
    for wrong in (partial(BitBudget, 0.0), partial(FollowLoss, 0.5), partial(FollowLoss, memory=1.0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    with pytest.raises(FedqError, match="upload"):
        process(broadcast=StateDictEncoder(STEP, common_scale=True, rate_control=FollowLoss()))


def test_a_budget_out_of_reach_moves_the_step_as_far_as_it_may() -> None:
    state = BitBudget(1e-300).initial_state(None)
    for number in range(9):
        state = BitBudget(1e-300).followed(state, 1.0)
        assert float(state["factor"]) == min(8.0 ** (number + 1), 2.0**20)
