import math

import numpy as np
import pytest
import torch

from fedq.data import Client, Examples
from fedq.learning import ClientFailure, TooFewClients
from fedq.learning.guard import NormGuard, norm


def test_the_norm_is_that_of_all_floating_tensors_together():
    update = {"a": torch.tensor([[3.0, 0.0]]), "n": torch.tensor(100), "b": torch.tensor([4.0, 12.0]).half()}
    assert norm(update) == pytest.approx(13.0)
    assert norm({}) == 0.0
    assert norm({"a": torch.full((10,), 3e38)}) == math.inf  # the norm overflows: the update must be refused


def test_what_is_out_of_line_is_clipped_to_the_limit_or_dropped():
    clip, drop = (NormGuard(action, multiple=3.0) for action in ("clip", "drop"))
    for guard in (clip, drop):
        assert guard.scale(5.0, 2.0) == guard.scale(6.0, 2.0) == 1.0
        assert guard.scale(1e9, 0.0) == 1.0  # the first round has no limit
    assert clip.scale(60.0, 2.0) == pytest.approx(0.1)
    with pytest.raises(ClientFailure, match=r"norm 60, the limit is 6") as failure:
        drop.scale(60.0, 2.0)
    assert failure.value.kind == "outlier"
    for guard in (clip, drop):
        with pytest.raises(ClientFailure):
            guard.scale(math.inf, 0.0)
    assert NormGuard("clip", multiple=3.0, initial=1.0).scale(30.0, 0.0) == pytest.approx(0.1)


def test_the_estimate_comes_to_the_quantile_of_what_it_sees():
    rng = np.random.default_rng(0)
    for quantile in (0.5, 0.8):
        guard, estimate, seen = NormGuard("clip", quantile=quantile, rate=0.1), 0.0, []
        for _ in range(300):
            estimate = guard.update(estimate, rng.lognormal(1.0, 0.5, 50).tolist())
            seen.append(estimate)
        z = {0.5: 0.0, 0.8: 0.8416}[quantile]
        assert np.exp(np.mean(np.log(seen[50:]))) == pytest.approx(math.exp(1.0 + 0.5 * z), rel=0.05)


def test_outliers_fewer_than_half_do_not_move_the_median_far():
    guard, estimate = NormGuard("drop"), 0.0
    rng = np.random.default_rng(1)
    for _ in range(50):
        estimate = guard.update(estimate, [*rng.uniform(0.9, 1.1, 7), 1e6, 1e30, math.inf])
        assert 0.9 <= estimate <= 1.1


def test_the_estimate_follows_geometrically_and_survives_odd_rounds():
    guard = NormGuard("clip", rate=0.5)
    assert guard.update(0.0, [4.0]) == guard.update(0.0, [math.inf, 4.0]) == 4.0
    assert guard.update(4.0, [16.0]) == pytest.approx(8.0)
    assert guard.update(4.0, []) == guard.update(4.0, [0.0]) == guard.update(4.0, [math.inf]) == 4.0


@pytest.mark.parametrize("wrong", [{"action": "zero"}, {"quantile": 2.0}, {"rate": 0.0}, {"initial": math.inf}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        NormGuard(**{"action": "clip"} | wrong)


def blown_up(client: Client) -> Client:
    """Returns the client with pixels a thousand times as bright, so that its update has a far too large norm."""

    def load() -> Examples:
        x, y = client.load()
        return Examples(1000 * x, y)

    return Client(client.number, load)


def distance(a, b) -> float:
    return math.sqrt(sum(float((a.weights[name] - b.weights[name]).square().sum()) for name in a.weights))


@pytest.mark.parametrize("action", ["clip", "drop"])
def test_a_run_is_guarded_from_its_second_round_on(process, client, action):
    guarded, plain = process(guard=NormGuard(action)), process()
    honest = [client(i) for i in range(4)]
    after_one, _ = guarded.next(guarded.initialize(), honest)
    assert 0 < after_one.norm < 100
    attacked, metrics = guarded.next(after_one, [*honest[:3], blown_up(client(9))])
    unguarded, _ = plain.next(after_one, [*honest[:3], blown_up(client(9))])
    assert metrics["clients_failed/outlier"] == (action == "drop")
    assert distance(attacked, after_one) < 4 * after_one.norm < distance(unguarded, after_one) / 4
    if action == "drop":  # the weight is dropped too: the result is as without the client
        without, _ = guarded.next(after_one, honest[:3])
        assert distance(attacked, without) < 1e-6


def test_cohorts_in_vain_move_the_estimate(process, client):
    """If the guard drops all updates, the limit rises. Otherwise the round would repeat without end."""
    averaging, repeats = process(guard=NormGuard("drop", initial=1e-3)), 0
    state = averaging.initialize()
    while state.round == 0:
        try:
            state, metrics = averaging.next(state, [client(n) for n in range(4)])
        except TooFewClients as error:
            state, repeats = error.state, repeats + 1
        assert repeats < 20
    assert repeats >= 2
    assert metrics["clients"] >= 1
