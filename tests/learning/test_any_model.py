"""Unusual models: tied, frozen and integer parameters, hidden buffers, five axes, layers that refuse a batch."""

import logging
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from fedq.config import build_encoder
from fedq.data import Client, Examples
from fedq.encoding import ANS, Cast, EncodeError, Encoder, StateDictEncoder, StepQuantization
from fedq.errors import FedqError
from fedq.learning import FederatedDropout, LocalTraining
from fedq.learning.evaluation import evaluate
from fedq.learning.federated_averaging import Diverged
from fedq.learning.local_training import channels_last
from fedq.models import FedAvgCNN
from fedq.simulation.workers import Workers
from fedq.train import CONF


class Dense(nn.Module):
    """Two layers; `change` may change the model."""

    def __init__(self, change=lambda model: None):
        super().__init__()
        self.first, self.last = nn.Linear(28 * 28, 10), nn.Linear(10, 10)
        self.units = {"first": (("first.weight", 0), ("first.bias", 0), ("last.weight", 1))}
        change(self)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.flatten(1))))


@pytest.mark.parametrize("dropout", [None, FederatedDropout(0.5)])
def test_what_is_frozen_does_not_move(process, client, dropout):
    """No client's step and no weight decay on the server moves a frozen weight."""

    def frozen(model):
        model.first.requires_grad_(False)
        model.register_parameter("codes", nn.Parameter(torch.arange(5), requires_grad=False))

    decaying = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    averaging = process(model=partial(Dense, frozen), server=decaying, submodel=dropout)
    start = averaging.initialize()
    after, _ = averaging.next(start, [client(0), client(1)])
    assert torch.equal(after.weights["first.weight"], start.weights["first.weight"])
    assert torch.equal(after.weights["codes"], torch.arange(5))
    assert not torch.equal(after.weights["last.weight"], start.weights["last.weight"])


@pytest.mark.parametrize("reference", ["none", "initial"])
def test_dither_does_not_move_what_is_frozen(process, client, reference):
    """With dither, an update of 0 is decoded as noise."""
    dithered = StateDictEncoder(Encoder([StepQuantization(0.1, rounding="dithered", relative=False)], ANS()), 0)
    averaging = process(
        model=partial(Dense, lambda model: model.first.requires_grad_(False)),
        broadcast=replace(dithered, reference=reference),
        upload=dithered,
    )
    start = averaging.initialize()
    after, _ = averaging.next(start, [client(0), client(1)])
    assert torch.equal(after.weights["first.weight"], start.weights["first.weight"])
    assert not torch.equal(after.weights["last.weight"], start.weights["last.weight"])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_what_has_no_mean_is_refused_unless_it_is_never_sent(process, client, dtype):
    def turning(model, persistent):
        model.register_buffer("turns", torch.ones(3).to(dtype), persistent)

    with pytest.raises(FedqError, match=f"model: 'turns' is {str(dtype)[6:]}: .* persistent=False"):
        process(model=partial(Dense, partial(turning, persistent=True)))
    averaging = process(model=partial(Dense, partial(turning, persistent=False)))
    averaging.next(averaging.initialize(), [client(0)])


class Counting(Dense):
    """A model whose output depends on its number of calls, in a buffer that no state_dict holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x) * self.calls


def test_what_no_state_dict_holds_does_not_go_from_client_to_client(process, client):
    clients, results = [client(number) for number in range(5)], []
    for count in (1, 3):
        with Workers(count) as workers:
            averaging = process(model=Counting, map=workers.map)
            state = averaging.initialize()
            for _ in range(2):
                state, _ = averaging.next(state, clients)
            results.append(state.weights)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])


def test_evaluation_changes_nothing(process, client):
    class CountingAlways(Counting):
        def forward(self, x):
            self.calls += not self.training
            return super().forward(x)

    weights, losses = [], []
    for evaluations in (0, 2):
        averaging = process(model=CountingAlways)
        state = averaging.initialize()
        for _ in range(2):
            losses += [averaging.evaluate(state, client(9).load())["loss"] for _ in range(evaluations)]
            state, _ = averaging.next(state, [client(0), client(1)])
        weights.append(state.weights)
    assert losses[0] == losses[1] != losses[2] == losses[3]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


class Voxels(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters, self.out = nn.Conv3d(1, 2, 3), nn.Linear(2 * 4 * 4 * 4, 10)

    def forward(self, x):
        return self.out(self.filters(x).flatten(1))


def test_convolutions_have_their_channels_last():
    """The layout equals torch's layout of a whole model. Without the layout a round of the CNN takes a third longer."""
    ours, theirs = channels_last(FedAvgCNN(10)), FedAvgCNN(10).to(memory_format=torch.channels_last)
    for tensor, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert tensor.stride() == expected.stride()


def test_five_axes_train(process):
    x, y = torch.rand(8, 1, 6, 6, 6), torch.arange(8)
    averaging = process(model=Voxels)
    start = averaging.initialize()
    after, _ = averaging.next(start, [Client(0, lambda: Examples(x, y))])
    assert not torch.equal(after.weights["filters.weight"], start.weights["filters.weight"])


NORM = ("weight", "bias", "running_mean", "running_var")


class Normalised(Dense):
    def __init__(self, change=lambda model: None):
        super().__init__(change)
        self.norm = nn.BatchNorm1d(10)
        self.units = {"first": (*self.units["first"], *((f"norm.{name}", 0) for name in NORM))}

    def forward(self, x):
        return self.last(self.norm(self.first(x.flatten(1))))


def test_a_client_whose_training_fails_is_left_out(process, client, caplog):
    """A batch norm refuses a batch of one example: 21 examples in batches of 20 end with one."""

    def unreadable():
        raise RuntimeError("the disk is gone")

    averaging = process(model=Normalised)
    start = averaging.initialize()
    with caplog.at_level(logging.DEBUG):
        with_them, metrics = averaging.next(start, [client(0, 20), client(1, 21), Client(2, unreadable)])
    without, _ = averaging.next(start, [client(0, 20)])
    assert (metrics["clients"], metrics["clients_failed/unable"], metrics["uploads"]) == (1, 2, 1)
    for name, value in with_them.weights.items():
        assert torch.equal(value, without.weights[name])
    for reason in (
        "client 1 is left out: ValueError: Expected more than 1 value",
        "client 2 is left out: RuntimeError: the",
    ):
        assert reason in caplog.text
    assert "in unreadable" in caplog.text  # the log has the traceback


def test_a_file_that_cannot_be_read_ends_the_round(process, client):
    def unreadable():
        raise OSError(5, "Input/output error")

    averaging = process()
    with pytest.raises(FedqError, match="client 3 cannot be read: .*Input/output error"):
        averaging.next(averaging.initialize(), [client(0), Client(3, unreadable)])


def test_clients_of_one_number_are_refused(process, client):
    averaging = process()
    with pytest.raises(FedqError, match="two clients of a cohort have the same number"):
        averaging.next(averaging.initialize(), [client(0), client(1), client(0)])


def test_a_chain_for_an_integer_is_not_called_divergence(process, client):
    averaging = process(model=Normalised, broadcast=StateDictEncoder(rules={"norm*": Encoder([Cast("float16")])}))
    with pytest.raises(
        EncodeError, match="'norm.num_batches_tracked' cannot be encoded: Cast takes floating"
    ) as raised:
        averaging.next(averaging.initialize(), [client(0, 20)])
    assert not isinstance(raised.value, Diverged)


def test_no_examples_to_evaluate_on_is_an_error():
    with pytest.raises(FedqError, match="test set is empty"):
        evaluate(Dense(), Examples(torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.int64)))


class Letters(nn.Module):
    """A model that takes int64 symbols, not pictures, as an embedding does."""

    def __init__(self):
        super().__init__()
        self.letters, self.out = nn.Embedding(26, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.out(self.letters(x).mean(1))


class Bytes(Dense):
    """A model that takes bytes and scales the pixels."""

    def forward(self, x):
        return super().forward(x.float() / 255)


@pytest.mark.parametrize(
    ("model", "shape", "dtype", "layer"),
    [(Letters, (8, 5), torch.int64, "letters.weight"), (Bytes, (8, 1, 28, 28), torch.uint8, "first.weight")],
    ids=["letters", "bytes"],
)
def test_what_a_model_takes_need_not_be_floating(process, model, shape, dtype, layer):
    x = torch.randint(26, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    examples = Examples(x, torch.arange(8))
    averaging = process(model=model)
    start = averaging.initialize()
    after, metrics = averaging.next(start, [Client(0, lambda: examples)])
    assert metrics["clients"] == 1
    assert not torch.equal(after.weights[layer], start.weights[layer])
    network = model().eval()
    network.load_state_dict(after.weights)
    expected = float(nn.functional.cross_entropy(network(x), examples.y).detach())
    assert averaging.evaluate(after, examples)["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["frontier", "bit_budget", "follow_loss"])
@pytest.mark.parametrize("dropout", [None, FederatedDropout(0.5)], ids=["whole", "parts"])
def test_batch_norms_variances_are_not_rounded(process, client, name, dropout):
    """Rounding could make a small variance negative, and then the loss would be NaN."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"encoder={name}"])
    chains = {direction: build_encoder(cfg, direction) for direction in ("broadcast", "upload")}

    def small(model):
        nn.init.normal_(model.first.weight, std=1e-3)

    many_steps = LocalTraining(lr=0.5, epochs=2, batch_size=2)
    averaging = process(model=partial(Normalised, small), client=many_steps, submodel=dropout, **chains)
    state = averaging.initialize()
    for _ in range(4):
        state, _ = averaging.next(state, [client(0, 20), client(1, 40)])
        assert float(state.weights["norm.running_var"].min()) > 0
    assert math.isfinite(averaging.evaluate(state, client(2, 40).load())["loss"])


def test_a_rule_may_be_for_a_buffer(process, client):
    rule = {"norm.running_*": Encoder([Cast("float16")])}
    averaging = process(model=Normalised, upload=StateDictEncoder(rules=rule))
    chains = averaging.protocol.weights.upload.chains
    assert chains["norm.running_var"].encoder == rule["norm.running_*"]
    assert chains["norm.num_batches_tracked"].encoder == Encoder()


def windows(model):
    flat = torch.ones(30)
    model.register_buffer("a", flat[:20])
    model.register_buffer("b", flat[10:])


def interleaved(model):
    flat = torch.ones(30)
    model.register_buffer("a", flat[::2])
    model.register_buffer("b", flat[1::2])


def tail(model):
    model.register_buffer("tail", model.last.weight.data[1:])


def buffer(tensor):
    return lambda model: model.register_buffer("made", tensor)


class Extra(Dense):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def without_gradients(model):
    model.requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (partial(Dense, windows), "'a' and 'b' share memory"),
        (partial(Dense, interleaved), "'a' and 'b' share memory"),
        (partial(Dense, tail), "'tail' .* share memory|share memory"),
        (partial(Dense, buffer(torch.zeros(1).expand(100))), "elements of 'made' share memory"),
        (partial(Dense, buffer(torch.zeros(3, 1).expand(3, 5))), "elements of 'made' share memory"),
        (partial(Dense, buffer(torch.arange(12.0).as_strided((5, 4), (2, 1)))), "elements of 'made' share memory"),
        (partial(Dense, buffer(torch.zeros(2, device="meta"))), "'made' must be a dense tensor with values"),
        (partial(Dense, buffer(torch.eye(2).to_sparse())), "'made' must be a dense tensor with values"),
        (Extra, "'_extra_state' of its state_dict is a dict"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "'1.weight' has no shape yet"),
        (lambda: nn.Flatten(), "no parameter to train"),
        (partial(Dense, without_gradients), "no parameter to train"),
    ],
    ids=range(12),
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_models_that_cannot_be_averaged_are_refused_at_the_start(process, model, sentence):
    with pytest.raises(FedqError, match=sentence):
        process(model=model)


def test_dense_tensors_of_any_strides_are_taken(process, client):
    def strided(model):
        model.register_buffer("transposed", torch.zeros(4, 5).t())
        model.register_buffer("nothing", torch.zeros(0, 3))
        flat = torch.zeros(40)
        model.register_buffer("left", flat[:20])
        model.register_buffer("right", flat[20:])

    averaging = process(model=partial(Dense, strided))
    _, metrics = averaging.next(averaging.initialize(), [client(0)])
    assert metrics["clients"] == 1


class Keeps(Dense):
    """A model that keeps a counter, a tensor, a generator and a list outside its state_dict, and adds an attribute."""

    def __init__(self):
        super().__init__()
        self.count, self.total, self.layers = 0, torch.zeros(()), [self.first]
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        assert self.layers[0] is self.first
        self.count += 1
        self.total += 1
        self.layers[0].uses = getattr(self.layers[0], "uses", 0) + 1
        factor = 1 + 0.1 * (self.count + self.total + self.layers[0].uses + torch.rand((), generator=self.generator))
        return super().forward(x) * factor


def test_nothing_passes_from_one_client_to_the_next(process, client):
    """The sum follows the order of the cohort, not the order in which workers train clients."""

    def backwards(function, items):
        yield from reversed([function(item) for item in reversed(list(items))])

    states = []
    for order in (map, backwards):
        averaging = process(model=Keeps, map=order)
        states.append(averaging.next(averaging.initialize(), [client(number) for number in range(4)])[0].weights)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


class Writes(Dense):
    """A model that writes to its input."""

    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(3))


def test_evaluation_and_training_leave_the_examples_alone(process, client):
    own = client(0).load()
    before = own.x.clone()
    averaging = process(model=Writes)
    state, _ = averaging.next(averaging.initialize(), [Client(0, lambda: own)])
    losses = {averaging.evaluate(state, own)["loss"] for _ in range(3)}
    assert len(losses) == 1
    assert torch.equal(own.x, before)


@pytest.mark.parametrize("value", [5, 2**40 + 1, 1_700_000_000_000_000_000, -(2**61), 2**61 + 12_345])
def test_integers_have_an_exact_mean(process, client, value):
    """Products of such values with the weights 30 and 20 overflow int64."""

    class Clock(Dense):
        def __init__(self):
            super().__init__()
            self.register_buffer("clock", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            if self.training:
                self.clock.fill_(value if len(x) == 20 else value - 10)
            return super().forward(x)

    averaging = process(model=Clock)
    # the last batches have 10 and 20 examples: (30 · (v − 10) + 20 · v) / 50 = v − 6
    state, _ = averaging.next(averaging.initialize(), [client(0, 30), client(1, 20)])
    assert int(state.weights["clock"]) == value - 6


def test_a_change_of_integers_beyond_their_sum_is_refused(process, client):
    class Clock(Dense):
        def __init__(self):
            super().__init__()
            self.register_buffer("clock", torch.tensor(2**62))

        def forward(self, x):
            if self.training:
                self.clock.fill_(-(2**62))
            return super().forward(x)

    averaging = process(model=Clock)
    with pytest.raises(FedqError, match=r"'clock' changes by 2\^62 or more"):
        averaging.next(averaging.initialize(), [client(0)])
