"""Models that draw random numbers in training: each client's draws depend only on the client's key."""

import math
import random
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedq.data import Client, Examples
from fedq.errors import FedqError
from fedq.keys import Key
from fedq.learning import LocalTraining, evaluate
from fedq.learning import client as client_module
from fedq.learning.draws import KeyedDraws, _runners
from fedq.simulation.workers import Workers

KEY, CPU = Key(3).fold("test"), torch.device("cpu")
X, IMAGE, POSITIVE = torch.randn(4, 6, 8), torch.randn(2, 3, 9, 9), torch.rand(3, 5) + 0.1
VOLUMES = torch.randn(2, 20, 5, 5, 5)


def keyed():
    return KeyedDraws(KEY, CPU)


def assert_same(weights, others):
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


# functions


FUNCTIONS = {
    **{name: partial(getattr(torch, name), 7) for name in ("rand", "randn", "randperm")},
    **{name: partial(getattr(torch, name), X) for name in ("rand_like", "randn_like")},
    "randint": lambda: torch.randint(9, (4,)),
    "randint from": lambda: torch.randint(3, 9, (4,)),
    "randint_like": lambda: torch.randint_like(X, 9),
    "randint_like from": lambda: torch.randint_like(X, 3, 9),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "normal of tensors": lambda: torch.normal(X, X.abs()),
    "bernoulli": lambda: torch.bernoulli(POSITIVE.clamp(0, 1)),
    "bernoulli of p": lambda: torch.bernoulli(X, 0.5),
    "multinomial": lambda: torch.multinomial(POSITIVE, 3),
    "poisson": lambda: torch.poisson(POSITIVE),
    "binomial": lambda: torch.binomial(torch.full((9,), 9.0), torch.full((9,), 0.4)),
    **{
        name: lambda name=name: getattr(torch.empty(9), name)()
        for name in ("bernoulli_", "cauchy_", "exponential_", "log_normal_", "normal_", "random_", "uniform_")
    },
    "geometric_": lambda: torch.empty(9).geometric_(0.3),
    "gamma": lambda: torch.distributions.Gamma(POSITIVE, POSITIVE).rsample(),
    "dirichlet": lambda: torch.distributions.Dirichlet(POSITIVE).rsample(),
    "categorical": lambda: torch.distributions.Categorical(POSITIVE).sample(),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "rrelu": lambda: F.rrelu(X, training=True),
    "rrelu_": lambda: F.rrelu_(X.clone(), training=True),
    "dropout1d": lambda: F.dropout1d(X),
    "dropout2d": lambda: F.dropout2d(IMAGE),
    "dropout3d": lambda: F.dropout3d(VOLUMES),
    "alpha_dropout": lambda: F.alpha_dropout(X, training=True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(X, training=True),
    "native_dropout": lambda: torch.native_dropout(X, 0.4, True)[0],
    "stochastic_depth": lambda: torchvision.ops.stochastic_depth(X, 0.5, "row"),
    "drop_block2d": lambda: torchvision.ops.drop_block2d(IMAGE, 0.5, 3),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(IMAGE, 2, output_size=3),
    "fractional_max_pool3d": lambda: F.fractional_max_pool3d(VOLUMES, 2, output_size=3, return_indices=True)[0],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_draws_from_the_key_what_torch_draws_from_a_generator_in_that_state(function):
    shared = torch.default_generator.get_state()
    with keyed() as draws:
        drawn, again = function(), function()
    assert draws.drawn
    assert torch.equal(torch.default_generator.get_state(), shared)
    torch.default_generator.manual_seed(KEY.fold("cpu").integer())
    assert torch.equal(drawn, function())
    assert torch.equal(again, function())
    assert not torch.equal(drawn, again)


NEVER = {
    *("_cudnn_init_dropout_state", "_cudnn_rnn", "miopen_rnn", "_lstm_mps"),  # parts of lstm, gru and rnn
    *("_fill_mem_eff_dropout_mask_", "_flash_attention_forward_no_dropout_inplace", "_fused_sdp_choice"),
    *("_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_triton_scaled_dot_attention", "_nested_tensor_softmax_with_shape"),
    "random",  # `torch.random` is a module
}
"""Operators that draw, or are marked as drawing, which models do not call directly."""


def test_every_operator_of_torch_that_draws_is_known():
    known = {getattr(function, "__name__", "") for function in _runners()}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name, None) if name != schema.name else None
        operator = packet and getattr(packet, schema.overload_name or "default", None)
        if operator and torch.Tag.nondeterministic_seeded in operator.tags:
            of_torch = any(hasattr(place, name) for place in (torch, torch.Tensor, F))
            assert not of_torch or name in known | NEVER, name


def test_a_generator_that_the_caller_names_is_used():
    with keyed() as draws:
        drawn = torch.rand(5, generator=torch.Generator().manual_seed(1))
    assert not draws.drawn
    assert torch.equal(drawn, torch.rand(5, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("off", [{"training": False}, {"p": 0.0}, {"p": 1.0}], ids=str)
def test_dropout_that_is_off_draws_nothing(off):
    with keyed() as draws:
        values = F.dropout(X, **off)
    assert not draws.drawn
    assert torch.equal(values, F.dropout(X, **off))


# masks


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_masks_keep_each_element_alone_with_its_probability(p):
    n = 200_000
    with keyed():
        first, second = (F.dropout(torch.ones(n, dtype=torch.float64), p) for _ in range(2))
    scale = 1 / (1 - p)
    for noise in (first, second):
        assert set(noise.unique().tolist()) == {0.0, torch.tensor(1.0).double().div(1 - p).item()}
        assert abs(float(noise.mean()) - 1) < 5 * math.sqrt(p / (1 - p) / n)
        assert abs(float(noise.var()) - p * scale) < 0.03 * p * scale
    for left, right in ((first[:-1], first[1:]), (first[: n // 2], first[n // 2 :]), (first, second)):
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 5 / math.sqrt(len(right))


def test_clients_rounds_and_seeds_have_masks_of_their_own():
    masks = []
    for key in (Key(1, 2, 3), Key(1, 2, 4), Key(1, 3, 3), Key(2, 2, 3)):
        with KeyedDraws(key, CPU):
            masks.append(tuple(F.dropout(torch.ones(64)).tolist()))
    assert len(set(masks)) == 4


def noise_of(shape, p, dtype=torch.float32):
    """Returns the first mask of the key, divided by 1 − p."""
    with keyed():
        return F.dropout(torch.ones(shape, dtype=dtype), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_dropout_has_torchs_values_and_gradients_for_the_same_mask(dtype, p):
    x = torch.randn(5, 7, 3, dtype=dtype).transpose(0, 2)
    leaf, noise = x.clone().requires_grad_(), torch.empty_like(x)
    with keyed():
        values, _ = F.dropout(leaf, p), torch.autograd.backward(F.dropout(leaf, p).sum())
    with keyed():
        assert torch.equal(F.dropout(x.clone(), p, inplace=True), values)
    with keyed():
        assert torch.equal(torch.dropout_(x.clone(), p, True), values)
    kept = values != 0
    assert 0 < kept.double().mean() < 1
    noise = kept.to(dtype).div_(1 - p)  # as torch's C++ does
    assert torch.equal(values, x * noise)


def test_the_gradient_of_dropout_is_its_mask():
    x = torch.randn(40, requires_grad=True)
    with keyed():
        F.dropout(x, 0.3).sum().backward()
    assert torch.equal(x.grad, noise_of(40, 0.3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_has_torchs_values_for_the_same_mask(causal, heads):
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 8)
    mask = None if causal else torch.rand(6, 6) < 0.7
    options = {"is_causal": causal, "enable_gqa": heads == 2, "scale": 0.3}
    with keyed():
        values = F.scaled_dot_product_attention(q, k, v, mask, 0.25, **options)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() if causal else mask
    k, v = (part.repeat_interleave(4 // heads, 1) for part in (k, v))
    scores = (q @ k.mT * 0.3).masked_fill(~allowed, -math.inf)
    weights = scores.softmax(-1).nan_to_num()  # a row with no allowed key gives 0
    torch.testing.assert_close(values, weights * noise_of(weights.shape, 0.25) @ v)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_drops_weights_by_the_key(need_weights):
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True), torch.randn(3, 5, 8)
    with keyed() as draws:
        values, _ = layer(x, x, x, need_weights=need_weights)
    assert draws.drawn
    q, k, v = (
        part.unflatten(-1, (2, 4)).transpose(1, 2)
        for part in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    weights = (q @ k.mT / 2).softmax(-1)
    noise = noise_of((6, 5, 5) if need_weights else (3, 2, 5, 5), 0.4).reshape(3, 2, 5, 5)
    by_hand = layer.out_proj((weights * noise @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(values, by_hand)


def test_an_encoder_layer_drops_thrice_after_its_attention():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True), torch.randn(3, 5, 8)
    with keyed():
        values = layer(x)
    with keyed():
        attended = layer.self_attn(x, x, x, need_weights=False)[0]
        noises = [F.dropout(torch.ones(3, 5, width), 0.3) for width in (8, 16, 8)]
    h = layer.norm1(x + attended * noises[0])
    h = layer.norm2(h + layer.linear2(torch.relu(layer.linear1(h)) * noises[1]) * noises[2])
    torch.testing.assert_close(values, h)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_drop_between_layers(kind, both_ways, packed):
    """A network of three layers equals three networks of one layer, with dropout between two networks."""
    net = kind(8, 5, 3, dropout=0.5, batch_first=True, bidirectional=both_ways)
    alone = [
        kind(8 if not i else 5 * (1 + both_ways), 5, 1, batch_first=True, bidirectional=both_ways) for i in range(3)
    ]
    each = len(net._flat_weights) // 3
    with torch.no_grad():
        for i, layer in enumerate(alone):
            for mine, its in zip(layer._flat_weights, net._flat_weights[i * each : (i + 1) * each], strict=True):
                mine.copy_(its)
    sequences = nn.utils.rnn.pack_padded_sequence(X, [6, 4, 2, 1], batch_first=True) if packed else X
    with keyed() as draws:
        values, last = net(sequences)
    assert draws.drawn
    h, states = sequences, []
    with keyed():
        for i, layer in enumerate(alone):
            if i:
                h = h._replace(data=F.dropout(h.data)) if packed else F.dropout(h)
            h, state = layer(h)
            states.append(state)
    torch.testing.assert_close(values, h)
    last, states = (last, zip(*states, strict=True)) if kind is nn.LSTM else ((last,), (states,))
    for one, parts in zip(last, states, strict=True):
        torch.testing.assert_close(one, torch.cat(parts))
    net.eval()
    with keyed() as draws:
        net(sequences)
    assert not draws.drawn


# whole rounds


class Block(nn.Module):
    """Attention, recurrence and all kinds of dropout; `again` repeats parts with checkpoints."""

    def __init__(self, again=None):
        super().__init__()
        self.again = again
        self.enter = nn.Linear(28, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.2, batch_first=True)
        self.lstm = nn.LSTM(16, 8, 2, dropout=0.3, batch_first=True)
        self.out = nn.Sequential(nn.AlphaDropout(0.1), nn.RReLU(), nn.Dropout(0.5), nn.Linear(8, 10))

    def run(self, part, x):
        return part(x) if self.again is None else checkpoint(part, x, use_reentrant=self.again)

    def forward(self, x):
        x = self.run(self.layer, self.enter(x.flatten(1, 2)))
        x = self.run(self.middle, torchvision.ops.stochastic_depth(x, 0.1, "row"))
        return self.run(self.out, x)

    def middle(self, x):
        return self.lstm(x)[0][:, -1] + 0.01 * torch.randn(8)


class Dropping(Block):
    """Two dense layers, with dropout in a part that a checkpoint may repeat."""

    def __init__(self, again=None):
        nn.Module.__init__(self)
        self.again, self.enter, self.out = again, nn.Linear(28 * 28, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.run(self.middle, self.enter(x.flatten(1)))

    def middle(self, x):
        return self.out(F.dropout(torch.relu(x + 0.1 * torch.randn(16))))


def rounds(process, client, model, map=map, n=2, seed=0):
    averaging = process(model=model, client=LocalTraining(lr=0.1, batch_size=10), map=map, seed=seed)
    state = averaging.initialize()
    for _ in range(n):
        state, metrics = averaging.next(state, [client(number, 20) for number in range(4)])
        assert metrics["clients"] == 4
    return state.weights


def test_any_number_of_workers_gives_the_same_bits(process, client):
    alone = rounds(process, client, Block)
    for number in (1, 2, 4):
        with Workers(number) as workers:
            assert_same(alone, rounds(process, client, Block, workers.map))
    other = rounds(process, client, Block, seed=1)
    assert not torch.equal(alone["out.3.weight"], other["out.3.weight"])


@pytest.mark.parametrize("again", [False, True], ids=["saved tensor hooks", "reentrant"])
def test_gradient_checkpointing_draws_the_same_masks_again(process, client, again):
    for model, tolerance in (
        (Dropping, 0),
        (Block, 1e-6),
    ):  # in Block, reentrant checkpoints round differently, also with torch's draws
        plain = rounds(process, client, model)
        with Workers(2) as workers:
            computed_again = rounds(process, client, partial(model, again), workers.map)
        for name, value in plain.items():
            torch.testing.assert_close(computed_again[name], value, atol=tolerance, rtol=tolerance)


def test_the_state_of_a_round_is_all_that_a_run_needs_to_go_on(process, client):
    clients = [client(number, 20) for number in range(2)]
    averaging = process(model=Block)
    state, _ = averaging.next(averaging.initialize(), clients)
    state, _ = averaging.next(state, clients)
    begun, resumed = process(model=Block), process(model=Block)
    middle, _ = begun.next(begun.initialize(), clients)
    after, _ = resumed.next(middle, clients)
    assert_same(state.weights, after.weights)


def test_each_client_of_each_round_has_masks_of_its_own(process, client):
    masks = []

    class Tells(Dropping):
        def middle(self, x):
            masks.append(tuple(F.dropout(torch.ones(64)).tolist()))
            return self.out(x)

    rounds(process, client, Tells)
    assert len(masks) == len(set(masks)) == 16  # four clients of two steps, in two rounds


def test_draws_of_another_thread_are_not_the_clients():
    """Threads without a client draw from torch's generator, and read the state of this generator."""
    inside, outside = threading.Event(), threading.Event()
    torch.manual_seed(5)
    expected, state = torch.rand(3), torch.get_rng_state()
    torch.manual_seed(5)
    seen = []

    def other():
        inside.wait(10)
        seen.extend([torch.rand(3), torch.get_rng_state()])
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with keyed():
        first = torch.rand(3)
        inside.set()
        assert outside.wait(10)
        second, its_state = torch.rand(3), torch.get_rng_state()
        torch.set_rng_state(its_state)
    thread.join()
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], state)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(its_state, state)
    with keyed():
        assert torch.equal(torch.rand(3), first) and torch.equal(torch.rand(3), second)


def test_a_state_that_is_set_gives_the_same_draws():
    with keyed():
        F.dropout(X), torch.rand(3)
        state = torch.get_rng_state()
        drawn = F.dropout(X), torch.rand(3)
        torch.set_rng_state(state)
        assert torch.equal(F.dropout(X), drawn[0]) and torch.equal(torch.rand(3), drawn[1])


class Draws(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.noise, self.out = noise, nn.Linear(28 * 28, 10)

    def forward(self, x):
        return self.out(x.flatten(1) + 0.1 * float(self.noise()))


@pytest.mark.parametrize(
    ("whose", "noise"),
    [
        ("numpy", lambda: np.random.standard_normal()),  # a bound method would be copied with its generator
        ("Python", lambda: random.random()),
        ("torch", lambda: torch.ops.aten.rand.default([])),
    ],
)
def test_a_model_that_draws_past_its_key_is_refused(process, client, whose, noise):
    averaging = process(model=partial(Draws, noise))
    with pytest.raises(FedqError, match=f"the model or the dataset draws random numbers from {whose}'s global"):
        averaging.next(averaging.initialize(), [client(0)])


def test_a_model_that_draws_nothing_pays_for_its_first_client_alone(process, client, monkeypatch):
    entered = []

    class Counted(KeyedDraws):
        def __enter__(self):
            entered.append(self)
            return super().__enter__()

    monkeypatch.setattr(client_module, "KeyedDraws", Counted)
    for model, times in ((None, 1), (partial(Draws, lambda: torch.rand(())), 3)):
        entered.clear()
        averaging = process(**({"model": model} if model else {}))
        averaging.next(averaging.initialize(), [client(number) for number in range(3)])
        assert len({id(draws) for draws in entered}) == times


@pytest.mark.parametrize("noise", [lambda: torch.randn(()), lambda: 0.0], ids=["draws", "draws nothing"])
def test_an_evaluation_that_draws_can_be_repeated(client, noise):
    model, examples, found = Draws(noise), client(0, 60).load(), []
    for seed in range(3):
        torch.manual_seed(seed)
        with Workers(2) as workers:
            found.append(evaluate(model, examples, 7, workers.map))
    assert found[0] == found[1] == found[2]
    model.noise = lambda: 0.0
    assert (evaluate(model, examples, 7) == found[0]) == (float(noise()) == 0.0)


def test_an_evaluation_that_draws_past_torch_is_refused(client):
    with pytest.raises(FedqError, match="draws random numbers from numpy's global generator"):
        evaluate(Draws(lambda: np.random.standard_normal()), client(0).load())


def test_a_dataset_that_draws_past_its_own_generator_is_refused(process, client):
    averaging = process()
    drawing = Client(0, lambda: client(0).load() if np.random.standard_normal() else None)
    with pytest.raises(FedqError, match="draws random numbers from numpy's global generator"):
        averaging.next(averaging.initialize(), [drawing])


class Late(nn.Module):
    """Draws only for some batches."""

    def __init__(self, draws):
        super().__init__()
        self.draws, self.out = draws, nn.Linear(28 * 28, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.out(F.dropout(x) if self.training and self.draws(x) else x)


def dark(client):
    x, y = client.load()
    return Examples(torch.zeros_like(x), y)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_model_that_draws_for_some_clients_only_draws_from_their_keys(process, client, workers):
    quiet, others = [client(0), client(1)], [client(number) for number in range(6)]
    with Workers(workers) as pool:
        late = process(model=partial(Late, lambda x: float(x[0, 0]) > 0.5), map=pool.map)
        before, _ = late.next(late.initialize(), [replace(one, load=partial(dark, one)) for one in quiet])
        after, _ = late.next(before, others)
    resumed = process(model=partial(Late, lambda x: float(x[0, 0]) > 0.5))
    assert_same(after.weights, resumed.next(before, others)[0].weights)
    never = process(model=partial(Late, lambda x: False))
    assert not torch.equal(after.weights["out.weight"], never.next(before, others)[0].weights["out.weight"])


@pytest.mark.parametrize("noise", [random.random, np.random.standard_normal, lambda: torch.randn(())])
def test_first_weights_follow_from_the_seed_whatever_generator_the_model_draws_them_from(process, noise):
    class Model(nn.Linear):
        def __init__(self):
            super().__init__(28 * 28, 10)
            self.weight.data.mul_(float(noise()))

    before = random.getstate(), np.random.get_state()[1].tolist()
    first, again, other = (process(model=Model, seed=seed).initialize().weights for seed in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first["weight"], other["weight"])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
