import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedq.data import Examples
from fedq.errors import FedqError
from fedq.keys import Key
from fedq.learning import evaluate
from fedq.learning.local_training import LocalTraining, update_of


def by_hand(model, examples, order, lr, momentum=0.0, proximal=0.0):
    """Implements local SGD again: v ← m v + g + μ (w − w0), w ← w − lr v, in batches of 20."""
    start = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in start]
    losses, correct = [], 0
    for i in range(0, len(order), 20):
        x, y = examples.x[order[i : i + 20]], examples.y[order[i : i + 20]]
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g, v, w in zip(model.parameters(), gradients, velocity, start, strict=True):
                v.mul_(momentum).add_(g + proximal * (p - w))
                p -= lr * v
        losses += [float(loss.detach())] * len(y)
        correct += int((logits.argmax(1) == y).sum())
    return sum(losses), correct


def trained(tiny, client, **settings):
    torch.manual_seed(0)
    model = tiny()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    examples, key = client(3, 50).load(), Key(1, 2, 3).fold("train")
    metrics = LocalTraining(lr=0.1, **settings).train(model, weights, examples, key)
    order = torch.from_numpy(key.fold("shuffle").fold("0").permutation(50))
    torch.manual_seed(0)
    return model, metrics, tiny(), examples, order


def assert_same(model, other):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_sgd_is_the_textbooks(tiny, client):
    model, metrics, other, examples, order = trained(tiny, client)
    loss, correct = by_hand(other, examples, order, 0.1)
    assert_same(model, other)
    assert metrics.seen == 50  # 20 + 20 + 10: the last batch is not dropped
    assert abs(metrics.sums["loss"] - loss) < 1e-3
    assert metrics.sums["correct"] == correct


def test_momentum_is_the_textbooks(tiny, client):
    model, _, other, examples, order = trained(tiny, client, momentum=0.9)
    by_hand(other, examples, order, 0.1, momentum=0.9)
    assert_same(model, other)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_torchs_to_the_last_bit(tiny, client, momentum):
    model, _, other, examples, order = trained(tiny, client, momentum=momentum)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=momentum)
    for i in range(0, len(order), 20):
        optimizer.zero_grad()
        F.cross_entropy(other(examples.x[order[i : i + 20]]), examples.y[order[i : i + 20]]).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_training_does_not_load_the_compiler():
    """torch.optim loads torch._dynamo at its first use, which takes seconds."""
    code = """
import sys, torch
from fedq.data import Examples
from fedq.keys import Key
from fedq.learning.local_training import LocalTraining
model = torch.nn.Linear(3, 2)
examples = Examples(torch.rand(5, 3), torch.zeros(5, dtype=torch.int64))
weights = {name: value.clone() for name, value in model.state_dict().items()}
LocalTraining(lr=0.1, momentum=0.5).train(model, weights, examples, Key(0))
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bf16_rounds_products_and_keeps_weights(tiny, client):
    torch.manual_seed(0)
    model = tiny()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    examples, updates = client(3, 50).load(), {}
    for precision in ("float32", "bf16"):
        # a step too small to change a bfloat16 weight
        LocalTraining(lr=1e-4).train(model, weights, examples, Key(1, 2, 3), precision=precision)
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())
        updates[precision] = torch.cat([value.flatten() for value in update_of(model.state_dict(), weights).values()])
    error = float((updates["bf16"] - updates["float32"]).norm() / updates["float32"].norm())
    assert 1e-4 < error < 2**-5  # 8 bits in a product, over three layers' worth of products
    model.load_state_dict(weights)
    losses = [evaluate(model, examples, precision=precision)["loss"] for precision in ("float32", "bf16")]
    assert 0 < abs(losses[1] - losses[0]) < 2**-8 * losses[0]


def test_proximal_pulls_towards_the_weights_received(tiny, client):
    model, _, other, examples, order = trained(tiny, client, proximal=0.5)
    by_hand(other, examples, order, 0.1, proximal=0.5)
    assert_same(model, other)


def test_each_epoch_has_an_order_of_its_own(tiny, client):
    _, metrics, *_ = trained(tiny, client, epochs=2)
    assert metrics.seen == 100
    key = Key(1, 2, 3).fold("train").fold("shuffle")
    orders = [key.fold(str(epoch)).permutation(50) for epoch in range(2)]
    assert (orders[0] != orders[1]).any()
    model, seen, examples = tiny(), [], client(3, 50).load()
    model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    LocalTraining(lr=0.1, epochs=2).train(model, tiny().state_dict(), examples, Key(1, 2, 3).fold("train"))
    assert torch.equal(torch.stack(seen), torch.cat([examples.x[order] for order in orders]))


def test_inputs_change_by_round_client_and_epoch(tiny, client):
    def shifts(key):
        seen, model = [], tiny()
        model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
        training = LocalTraining(lr=0.1, epochs=2, augment=lambda x, g: x + torch.randn(len(x), 1, 1, 1, generator=g))
        training.train(model, tiny().state_dict(), examples, key.fold("train"))
        orders = [key.fold("train").fold("shuffle").fold(str(epoch)).permutation(50) for epoch in range(2)]
        difference = torch.stack(seen) - torch.cat([examples.x[order] for order in orders])
        return [tuple(part.mean((1, 2, 3)).tolist()) for part in difference.split(50)]

    examples = client(3, 50).load()
    draws = [draw for key in (Key(1, 2, 3), Key(2, 2, 3), Key(1, 3, 3), Key(1, 2, 4)) for draw in shifts(key)]
    assert len(set(draws)) == 8
    torch.manual_seed(5)
    assert shifts(Key(1, 2, 3)) == draws[:2]


def test_of_a_large_client_a_random_part_is_used(tiny, client):
    _, metrics, *_ = trained(tiny, client, max_examples=30)
    assert metrics.seen == 30
    examples, parts = client(3, 50).load(), []
    for key in (Key(1), Key(2)):
        model, seen = tiny(), []
        model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.extend(inputs[0]))
        LocalTraining(lr=0.1, max_examples=30).train(model, tiny().state_dict(), examples, key)
        parts.append({i for i, x in enumerate(examples.x) if any(torch.equal(x, other) for other in seen)})
    assert parts[0] != parts[1] and {*range(30)} not in parts


def test_all_epochs_use_the_same_part_in_orders_of_their_own(tiny, client):
    model, seen = tiny(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.extend(map(float, inputs[0].flatten(1).sum(1))))
    LocalTraining(lr=0.1, max_examples=30, epochs=3).train(model, tiny().state_dict(), client(3, 50).load(), Key(1))
    epochs = seen[:30], seen[30:60], seen[60:]
    assert len(set(seen)) == 30 == len(epochs[2])
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU()], ids=str)
def test_a_model_that_draws_from_a_generator_of_all_threads_is_refused(client, layer):
    """Only a client's half gives the model a generator; local training alone does not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10), layer)
    with pytest.raises(FedqError, match="draws random numbers from torch's global generator"):
        LocalTraining(lr=0.1).train(model, model.state_dict(), client(0).load(), Key(0))
    layer.eval()
    model.train = lambda mode=True: model  # so the layer draws no numbers
    LocalTraining(lr=0.1).train(model, model.state_dict(), client(0).load(), Key(0))


@pytest.mark.parametrize(
    ("whose", "noise"),
    [("torch", lambda: torch.randn(())), ("numpy", np.random.standard_normal), ("Python", random.random)],
)
def test_a_dataset_that_draws_from_a_generator_of_all_threads_is_refused(process, client, whose, noise):
    def load():
        x, y = client(0).load()
        return Examples(x + 0.1 * noise(), y)

    averaging = process()
    with pytest.raises(FedqError, match=f"or the dataset draws random numbers from {whose}'s"):
        averaging.next(averaging.initialize(), [replace(client(0), load=load)])


def test_the_received_weights_are_not_changed(tiny, client):
    model = tiny()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in weights.items()}
    LocalTraining(lr=0.1, proximal=0.1).train(model, weights, client(0).load(), Key(0))
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_integers_are_uploaded_as_they_are():
    received = {"w": torch.ones(2), "n": torch.tensor(250, dtype=torch.uint8)}
    update = update_of({"w": torch.full((2,), 3.0), "n": torch.tensor(4, dtype=torch.uint8)}, received)
    assert update["w"].tolist() == [2.0, 2.0]
    assert received["w"].tolist() == [1.0, 1.0]
    assert update["n"] == 4
    assert update["n"].dtype == torch.uint8
