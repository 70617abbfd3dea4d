from functools import partial

import numpy as np
import pytest
import torch
from test_config import configured

from fedq.config import build_server
from fedq.learning.server import server_step, weighted

OPTIMIZERS = [
    partial(torch.optim.SGD, lr=1.0),
    partial(torch.optim.SGD, lr=0.3, momentum=0.9),
    partial(torch.optim.Adam, lr=0.01, eps=1e-3),
    partial(torch.optim.Adagrad, lr=0.03),
]


def test_rate_one_sgd_is_the_plain_mean():
    weights = {"w": torch.tensor([1.0, 2.0])}
    total = {"w": torch.tensor([30.0, -60.0])}
    after, _ = server_step(OPTIMIZERS[0], {}, weights, frozenset({"w"}), total, 30)
    assert after["w"].tolist() == [2.0, 0.0]
    assert weights["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_any_optimizer_steps_as_it_would_on_its_own(build):
    means = [torch.tensor([0.5, -0.25]), torch.tensor([0.1, 0.3]), torch.tensor([-0.2, 0.0])]
    reference = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = build([reference])
    weights, state = {"w": torch.tensor([1.0, 2.0])}, {}
    for mean in means:
        reference.grad = -mean
        optimizer.step()
        before = {k: v.clone() for k, v in weights.items()}
        old_weights, old_state = weights, state
        weights, state = server_step(build, state, weights, frozenset({"w"}), {"w": mean * 7}, 7)
        again, _ = server_step(build, old_state, old_weights, frozenset({"w"}), {"w": mean * 7}, 7)
        assert torch.equal(again["w"], weights["w"])  # a pure step: the old state is unchanged
        assert torch.equal(old_weights["w"], before["w"])
    torch.testing.assert_close(weights["w"], reference.detach())


def test_integer_buffers_take_the_exact_mean_to_the_nearest_integer():
    big = 2**53 + 1  # float64 cannot hold this number
    weights = {"w": torch.zeros(1), "n": torch.tensor(big), "b": torch.tensor([True, False]), "s": torch.tensor(1.5)}
    zero = {"w": torch.zeros(1)}
    updates = [
        (zero | {"n": torch.tensor(big + 4), "b": torch.tensor([False, True]), "s": torch.tensor(1.0)}, 30),
        (zero | {"n": torch.tensor(big + 1), "b": torch.tensor([True, True]), "s": torch.tensor(0.5)}, 10),
    ]
    parts = [weighted(update, weights, weight) for update, weight in updates]
    total = {name: parts[0][name] + parts[1][name] for name in weights}
    after, _ = server_step(OPTIMIZERS[0], {}, weights, frozenset({"w"}), total, 40)
    assert int(after["n"]) == big + 3  # (4·30 + 1·10) / 40 = 3.25
    assert after["b"].tolist() == [False, True]
    assert after["b"].dtype == torch.bool
    assert float(after["s"]) == 1.5 + (30 * 1.0 + 10 * 0.5) / 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_narrow_tensors_do_not_overflow(dtype):
    """400 examples times 200 overflow float16, and a bfloat16 sum would lose small terms."""
    weights = {"w": torch.full((3,), 1.0, dtype=dtype), "b": torch.full((2,), 1.0, dtype=dtype)}
    total: dict = {}
    for value, examples in ((200.0, 400), (201.0, 400), (1.0, 1)):
        own = weighted({name: torch.full_like(t, value) for name, t in weights.items()}, weights, examples)
        total = {name: tensor + total.get(name, 0) for name, tensor in own.items()}
    after, _ = server_step(partial(torch.optim.SGD, lr=1.0), {}, weights, frozenset(["w"]), total, 801)
    mean = 1 + (200 * 400 + 201 * 400 + 1) / 801
    for value in after.values():
        assert value.dtype == dtype
        assert float(value[0]) == pytest.approx(mean, rel=torch.finfo(dtype).eps)


def test_adagrad_is_that_of_the_paper():
    """Reddi 2021, algorithm 2, with β₁ = 0: v ← v + Δ², x ← x + η Δ / (√v + τ), where v begins at τ²."""
    build = build_server(configured("server=adagrad"))
    weights, state, x, v, tau = {"w": torch.tensor([1.0, 2.0])}, {}, np.array([1.0, 2.0]), 1e-6, 1e-3
    for mean in ([1e-4, -2e-3], [5e-3, 0.0], [-1e-4, 1e-1]):
        update = {"w": torch.tensor(mean)}
        weights, state = server_step(build, state, weights, frozenset("w"), update, 1)
        v = v + np.square(mean)
        x = x + 0.03 * np.array(mean) / (np.sqrt(v) + tau)
        np.testing.assert_allclose(weights["w"], x, rtol=1e-6)
