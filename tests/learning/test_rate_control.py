import itertools
import math
from functools import partial, reduce

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
from fedq.encoding.codec import RATE_CONTROL
from fedq.errors import FedqError

STEP = Encoder([StepQuantization(1.0, relative=False)], ANS())


def round_of(encoder, tensors, state, serial, clients=3, loss=None):
    """Encodes and decodes the messages of a cohort; returns their bytes and the next state."""
    codec, reports, lengths = encoder.bind(schema_of(tensors), reports=True), [], []
    params = codec.adaptation.params(state)
    for client in range(clients):
        message, _ = codec.encode(tensors, Key(0, serial, client), params, loss=loss)
        reports.append(codec.adaptation.as_cohort(codec.decode(message, Key(0, serial, client), params).attached))
        lengths.append(len(message))
    return lengths, codec.adaptation.update_state(state, reduce(codec.adaptation.combine, reports))


def initial_state(encoder, tensors):
    return encoder.bind(schema_of(tensors)).adaptation.initial_state()


@pytest.mark.parametrize("bits", [0.2, 1.0, 3.0])
def test_messages_reach_the_budget(bits):
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(300, 100, generator=generator), "b": 5 * torch.randn(20_000, generator=generator)}
    encoder = StateDictEncoder(STEP, 0, common_scale=True, rate_control=BitBudget(bits))
    state = initial_state(encoder, tensors)
    for serial in range(12):
        # the tensors grow, as weights that move away from their initial values
        lengths, state = round_of(encoder, {n: t * 1.1**serial for n, t in tensors.items()}, state, serial)
    assert all(8 * length / 50_000 == pytest.approx(bits, rel=0.05) for length in lengths)


@pytest.mark.parametrize(("bits", "rounds"), [(8.0, 3), (4.0, 3), (0.5, 5), (0.1, 7)])
def test_high_and_low_budgets_are_reached_within_few_rounds(bits, rounds):
    tensors = {"a": torch.randn(40_000, generator=torch.Generator().manual_seed(0))}
    encoder = StateDictEncoder(STEP, 0, common_scale=True, rate_control=BitBudget(bits))
    state = initial_state(encoder, tensors)
    for serial in range(rounds):
        lengths, state = round_of(encoder, tensors, state, serial, clients=1)
    assert 0.9 * bits < 8 * lengths[0] / 40_000 < 1.2 * bits


def test_each_bit_too_many_or_too_few_moves_a_high_budgets_step_by_a_factor_of_two_at_least():
    state = BitBudget(8.0).initial_state(None) | {"factor": torch.tensor(2.0**-10)}
    assert float(BitBudget(8.0).followed(state, 9.0)["factor"]) == 2.0**-9
    assert float(BitBudget(8.0).followed(state, 3.0)["factor"]) == 2.0**-15
    assert float(BitBudget(0.5).followed(state, 0.25)["factor"]) == pytest.approx(2.0 ** (-10 - 1 / 1.5))


def test_no_budget_and_no_report_moves_the_step_out_of_its_range():
    for bits, reported in itertools.product((1e-300, 1.5, 8.0, 1e300), (1e-38, 1.0, 3e38)):
        state = BitBudget(bits).initial_state(None)
        for _ in range(9):
            state = BitBudget(bits).followed(state, reported)
            assert 2.0**-20 <= float(state["factor"]) <= 2.0**20


def test_the_budget_goes_where_it_reduces_the_error_most():
    """Reverse water-filling (Cover and Thomas 2006, §10.3): equal squared errors for an element of either tensor."""
    generator = torch.Generator().manual_seed(1)
    tensors = {"a": torch.randn(50_000, generator=generator), "b": 16 * torch.randn(50_000, generator=generator)}
    encoder = StateDictEncoder(STEP, 0, common_scale=True, rate_control=BitBudget(4.0))
    codec, state = encoder.bind(schema_of(tensors)), initial_state(encoder, tensors)
    for serial in range(8):
        _, state = round_of(encoder, tensors, state, serial)
    params = codec.adaptation.params(state)
    decoded, _ = codec.decode(codec.encode(tensors, Key(0), params).message, Key(0), params)
    errors = [float((decoded[name] - tensors[name]).square().mean()) for name in tensors]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    # 4 bits on average: 2 fewer for the small tensor and 2 more for the large, 0.254 bits above Shannon's bound
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
    # by hand: average 6 is the lowest, and average 8 is the first above the average three rounds earlier
    first = next(i for i in range(3, len(losses)) if averages[i] >= averages[i - 3])
    assert factors[: first + 1] == [8.0] * first + [4.0]
    # the average continues through a halving; three rounds later the test compares it with the average at the halving
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
def test_integer_arguments_give_the_same_params_in_every_round(rate_control):
    state = rate_control.initial_state(None)
    declared = schema_of(state)
    for loss in (2.0, 3.0, 4.0, 5.0):
        state = rate_control.update_state(state, {rate_control.reports: torch.tensor([loss])})
        assert schema_of(state) == declared


def test_reports_that_are_not_positive_numbers_are_ignored():
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


def test_a_message_of_zeros_changes_no_state():
    """The first broadcast of a difference from initial weights is all zero, and takes few bits at any step."""
    zeros, encoder = (
        {"a": torch.zeros(300, 100)},
        StateDictEncoder(STEP, 0, common_scale=True, rate_control=BitBudget(1.0)),
    )
    initial = initial_state(encoder, zeros)
    _, state = round_of(encoder, zeros, initial, 0)
    assert state.keys() == initial.keys()
    assert all(torch.equal(value, initial[path]) for path, value in state.items())


def test_a_rate_control_that_follows_the_loss_needs_one():
    encoder = StateDictEncoder(STEP, 0, common_scale=True, rate_control=FollowLoss())
    tensors = {"a": torch.ones(3)}
    codec = encoder.bind(schema_of(tensors))
    with pytest.raises(TypeError, match="loss="):
        codec.encode(tensors, Key(0), codec.adaptation.params(codec.adaptation.initial_state()))
    with pytest.raises(TypeError, match="params="):
        codec.encode(tensors, Key(0), loss=1.0)


def test_a_round_follows_both_rate_controls_and_counts_their_bits(process, client):
    chain = StateDictEncoder(STEP, 0, common_scale=True)
    paced = [
        StateDictEncoder(STEP, 0, common_scale=True, rate_control=rate_control)
        for rate_control in (BitBudget(0.5), FollowLoss(4.0))
    ]
    clients = [client(number) for number in range(3)]
    plain, with_pace = process(broadcast=chain, upload=chain), process(broadcast=paced[0], upload=paced[1])
    state = with_pace.initialize()
    assert state.upload.keys() == {f"{RATE_CONTROL}/factor", f"{RATE_CONTROL}/losses"}
    state, _ = with_pace.next(state, clients)
    _, metrics = plain.next(plain.initialize(), clients)
    # each client receives two factors; the first broadcast is otherwise the same
    assert state.broadcasted_bits - metrics["broadcast_bits"] == 3 * 2 * 32
    state, first = with_pace.next(state, clients)
    assert float(state.broadcast[f"{RATE_CONTROL}/factor"]) != 1.0
    assert float(state.upload[f"{RATE_CONTROL}/losses"][-1]) == pytest.approx(first["train/loss"], rel=0.5)


def test_contradicting_options_are_refused(process):
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
