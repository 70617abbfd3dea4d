"""Federated dropout: clients that receive, train and send parts of the model (Caldas 2018)."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_config import configured, options
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedq.config import build_encoder
from fedq.data import Client, Examples
from fedq.encoding import (
    AdaptiveEncodingStage,
    Codec,
    Encoder,
    FixedWidth,
    Key,
    MessageError,
    PowerSGD,
    Raw,
    StateDictEncoder,
    StateUpdate,
    TensorSpec,
    UniformQuantization,
    schema_of,
)
from fedq.encoding.message import repacked
from fedq.errors import FedqError
from fedq.learning import Diverged, ErrorFeedback, FederatedDropout, LocalTraining, Scaffold
from fedq.learning.guard import NormGuard
from fedq.learning.submodel import SubModels
from fedq.models import MLP, FedAvgCNN
from fedq.simulation import checkpoint
from fedq.simulation.workers import Workers

UINT8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), 100)
POWERSGD = StateDictEncoder(Encoder([PowerSGD(2)]), 100)


class Parts(nn.Module):
    """A model with two groups of units.

    A filter of the convolution feeds a batch norm and four columns of the dense layer.
    """

    units: ClassVar = {
        "conv": (
            *((f"conv.{name}", 0) for name in ("weight", "bias")),
            *((f"norm.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")),
            ("hidden.weight", 1),
        ),
        "hidden": (("hidden.weight", 0), ("hidden.bias", 0), ("out.weight", 1)),
    }

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 14, stride=14)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 4, 9)
        self.out = nn.Linear(9, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1))))


def places(key: Key, keep: float) -> dict[str, tuple[np.ndarray, ...]]:
    """Returns for each tensor of Parts the rows and columns of the client of `key`, without code of fedq.learning."""
    conv, hidden = (
        np.sort(key.fold("dropout").fold(group).permutation(n)[: max(1, round(keep * n))])
        for group, n in (("conv", 6), ("hidden", 9))
    )
    columns = np.array([4 * unit + i for unit in conv for i in range(4)])
    norm = {f"norm.{name}": (conv,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {
        "conv.weight": (conv, np.arange(1), np.arange(14), np.arange(14)),
        "conv.bias": (conv,),
        **norm,
        "norm.num_batches_tracked": (),
        "hidden.weight": (hidden, columns),
        "hidden.bias": (hidden,),
        "out.weight": (np.arange(10), hidden),
        "out.bias": (np.arange(10),),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def parts(process):
    def build(keep, **changes):
        return process(**{"model": Parts, "submodel": FederatedDropout(keep)} | changes)

    return build


@pytest.fixture
def sent(monkeypatch):
    """Returns a record of all messages: (client, whether it is an upload) → message, key, and the tensors in it."""
    messages = {}
    encode = Codec.encode

    def recording(self, tensors, key, *args, **kwargs):
        encoded = encode(self, tensors, key, *args, **kwargs)
        if key.client != Key(0).client and "report/loss" not in tensors:
            kept = {name: tensor.clone() for name, tensor in tensors.items()}
            messages[key.client, "broadcast" not in key.path] = (encoded.message, key, kept)
        return encoded

    monkeypatch.setattr(Codec, "encode", recording)
    return messages


def test_each_coordinate_is_the_average_over_those_who_had_it(parts, client, sent):
    """Implements the mean again in numpy, from the messages, with the counter of batches and a client that fails."""
    averaging = parts(0.5, seed=5)
    start = averaging.initialize()
    sizes = {4: 50, 7: 20, 1: 33, 2: 61}
    empty = Client(9, lambda: Examples(torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.int64)))
    state, metrics = averaging.next(start, [*(client(number, n) for number, n in sizes.items()), empty])
    assert (metrics["clients"], metrics["clients_failed"]) == (4, 1)

    unmoved = 0
    for name, before in start.weights.items():
        total, weight = np.zeros(before.shape), np.zeros(before.shape)
        for number, n in sizes.items():
            own = np.ix_(*places(Key(5, 0, number), 0.5)[name])
            _, _, received = sent[number, False]
            np.testing.assert_array_equal(received[name].numpy(), before.numpy()[own])
            update = sent[number, True][2][name].double().numpy()
            total[own] += n * (update - (0 if before.is_floating_point() else before.numpy()[own]))
            weight[own] += n
        mean = total / np.maximum(weight, 1)
        if before.dtype == torch.int64:
            assert int(state.weights[name]) == int(before) + math.floor(float(mean) + 0.5)
            continue
        after = state.weights[name].double().numpy()
        np.testing.assert_allclose(after, before.double().numpy() + mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(after[weight == 0], before.double().numpy()[weight == 0])
        unmoved += (weight == 0).sum()
    assert unmoved


def test_what_was_decoded_from_the_messages_is_what_trained_the_model(parts, client, sent, monkeypatch):
    """Fails if either side used the original tensors, because the decoded tensors differ."""
    started_from = []
    train = LocalTraining.train
    monkeypatch.setattr(
        LocalTraining,
        "train",
        lambda self, model, weights, *rest: (started_from.append(weights), train(self, model, weights, *rest))[1],
    )
    averaging = parts(0.5, broadcast=UINT8, upload=UINT8)
    start = averaging.initialize()
    state, _ = averaging.next(start, [client(3)])
    (down, down_key, part), (up, up_key, _) = sent[3, False], sent[3, True]
    codec = UINT8.bind(schema_of(part))
    received, _ = codec.decode(down, down_key)
    assert same(received, started_from[0])
    assert not torch.equal(received["conv.weight"], part["conv.weight"])
    update, _ = codec.decode(up, up_key)
    for name, own in places(Key(0, 0, 3), 0.5).items():
        moved = start.weights[name].numpy()[np.ix_(*own)] + update[name].numpy()
        torch.testing.assert_close(state.weights[name].numpy()[np.ix_(*own)], moved, rtol=1e-6, atol=1e-7)


def test_a_message_to_another_client_is_refused(parts, process):
    averaging = parts(0.5, broadcast=UINT8)
    broadcast, _ = averaging.downlink.open(averaging.initialize(), [3, 4])
    whole, receive = averaging.protocol.receive(broadcast.messages), averaging.protocol.receive
    message, _ = averaging.downlink.part(whole, 3)
    assert receive([message], client=3).weights["hidden.bias"].shape == (4,)
    with pytest.raises(MessageError, match="client 3; expected seed 0, round 0, client 4"):
        receive([message], client=4)
    with pytest.raises(MessageError, match="the message has schema"):
        receive([message])
    # if all clients train the whole model, one client's message is not a broadcast
    averaging = process()
    broadcast, _ = averaging.downlink.open(averaging.initialize(), [3])
    with pytest.raises(MessageError, match="round 0, client 3; expected seed 0, round 0, client 18446744073709551615"):
        averaging.protocol.receive([repacked(broadcast.messages[0], Key(0, 0, 3))])


def test_what_nobody_had_does_not_move_and_the_rest_does(parts, client):
    averaging = parts(0.5)
    start = averaging.initialize()
    state, _ = averaging.next(start, [client(3)])
    for name, own in places(Key(0, 0, 3), 0.5).items():
        had = np.zeros(start.weights[name].shape, bool)
        had[np.ix_(*own)] = True
        moved = (state.weights[name] != start.weights[name]).numpy()
        assert not moved[~had].any(), name
        if name != "conv.bias":  # the batch norm removes this bias
            assert moved[had].mean() > 0.4, name  # a ReLU may block a unit's gradient


def test_units_are_drawn_for_each_client_and_round_and_all_alike_often():
    sub_models = SubModels(Parts(), FederatedDropout(0.34))
    counts = np.zeros(9)
    for number in range(600):
        units = sub_models.drawn(Key(1, number % 20, number // 20))["hidden"].numpy()
        assert len(units) == 3
        assert (np.diff(units) > 0).all()
        counts[units] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 26  # chi-square with 8 degrees of freedom, exceeded once in a thousand
    one, other = (sub_models.drawn(Key(1, 0, number)) for number in (0, 1))
    assert not all(torch.equal(one[group], other[group]) for group in one)
    assert [len(units) for units in SubModels(Parts(), FederatedDropout(0.01)).drawn(Key(0)).values()] == [1, 1]


@pytest.mark.parametrize("model", [FedAvgCNN, MLP])
def test_a_sub_model_computes_what_the_whole_does_with_the_other_units_at_0(model):
    torch.manual_seed(0)
    whole, x = model(10).double(), torch.rand(3, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) / 30)  # also biases
    sub_models = SubModels(whole, FederatedDropout(0.4))
    units = sub_models.drawn(Key(0, 0, 1))
    part = sub_models.model(whole)
    part.load_state_dict(sub_models.cut(whole.state_dict(), units))
    kept = sub_models.whole(sub_models.cut(whole.state_dict(), units), units)  # weights of all other units are 0
    assert not same(kept, whole.state_dict())
    silent = model(10).double()
    silent.load_state_dict(kept)
    torch.testing.assert_close(part(x), silent(x), rtol=1e-12, atol=1e-12)
    # the declared groups are complete: zero outgoing weights alone have the same effect
    for group, own in units.items():
        name, axis = model.units[group][-1]
        columns = whole.state_dict()[name].unflatten(axis, (len(whole.get_parameter(f"{group}.bias")), -1))
        dropped = torch.ones(columns.shape[axis], dtype=torch.bool)
        dropped[own] = False
        columns[:, dropped] = 0
    torch.testing.assert_close(part(x), whole(x), rtol=1e-12, atol=1e-12)


def test_local_computation_shrinks():
    model, x = FedAvgCNN(10), torch.rand(20, 1, 28, 28)

    def operations(network):
        with FlopCounterMode(display=False) as counter:
            network(x)
        return counter.get_total_flops() / 20 / 2

    for keep, conv1, conv2, dense in ((0.75, 24, 48, 384), (0.5, 16, 32, 256)):
        own = 784 * 25 * conv1 + 196 * 25 * conv1 * conv2 + 49 * conv2 * dense + dense * 10
        assert operations(SubModels(model, FederatedDropout(keep)).model(model)) == own
    assert operations(model) == 784 * 25 * 32 + 196 * 25 * 32 * 64 + 49 * 64 * 512 + 512 * 10


def test_bytes_are_those_of_the_shapes(process, client, sent):
    small, large = 16 * 25 + 16 + 32 + 256 + 256 * 10 + 10, (32 * 16 * 25, 256 * 32 * 49)
    uint8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()))
    for encoder, payload in ((StateDictEncoder(), 4 * sum(large)), (uint8, sum(large) + 2 * 8)):
        averaging = process(
            model=partial(FedAvgCNN, 10), broadcast=encoder, upload=encoder, submodel=FederatedDropout(0.5)
        )
        _, metrics = averaging.next(averaging.initialize(), [client(i, 5) for i in range(3)])
        assert metrics["broadcast_bits"] == metrics["aggregated_bits"] == 3 * 8 * (48 + 4 * small + payload)
        for i in range(3):
            assert len(sent[i, False][0]) == len(sent[i, True][0]) == 48 + 4 * small + payload


def test_a_client_that_fails_was_sent_its_part_all_the_same(parts, client):
    averaging = parts(0.5)
    failing = Client(9, lambda: Examples(torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.int64)))
    _, alone = averaging.next(averaging.initialize(), [client(0)])
    _, metrics = averaging.next(averaging.initialize(), [client(0), failing])
    assert metrics["broadcast_bits"] == 2 * alone["broadcast_bits"]
    assert metrics["aggregated_bits"] == alone["aggregated_bits"]


def test_all_of_the_model_is_a_run_without_dropout(process, client):
    server = partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    outcomes = []
    for dropout in (None, FederatedDropout(1.0)):
        averaging = process(model=Parts, server=server, submodel=dropout)
        state = averaging.initialize()
        for _ in range(3):
            state, metrics = averaging.next(state, [client(i, 20 + i) for i in range(5)])
        outcomes.append((state, {name: value for name, value in metrics.items() if "seconds" not in name}))
    assert same(outcomes[0][0].weights, outcomes[1][0].weights)
    assert outcomes[0][1] == outcomes[1][1]


def test_the_draws_of_a_clients_broadcast_are_not_those_of_its_upload(parts, client, sent):
    averaging = parts(0.5, broadcast=UINT8, upload=UINT8)
    averaging.next(averaging.initialize(), [client(0)])
    (down, key, _), (up, other, _) = sent[0, False], sent[0, True]
    assert key.bits(4, 64).tolist() != other.bits(4, 64).tolist()
    assert key[:3] == other[:3] == (0, 0, 0)  # the header names the client
    assert down[16:36] == up[16:36]


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_workers_changes_nothing(parts, client, sent, count):
    def run(**more):
        averaging = parts(0.5, broadcast=POWERSGD, upload=UINT8, guard=NormGuard("clip"), **more)
        state = averaging.initialize()
        for _ in range(3):
            state, _ = averaging.next(state, [client(i, 20 + i) for i in range(7)])
        return state, {place: message for place, (message, _, _) in sent.items()}

    alone, messages = run()
    with Workers(count) as workers:
        state, others = run(map=workers.map)
    assert same(alone.weights, state.weights)
    assert same(alone.broadcast, state.broadcast)
    assert messages == others
    assert alone.norm == state.norm > 0


@pytest.mark.parametrize("name", options("encoder"))
def test_it_composes_with_every_encoder(process, client, name):
    cfg = configured(f"encoder={name}")
    averaging = process(
        model=partial(MLP, 10),
        broadcast=build_encoder(cfg, "broadcast"),
        upload=build_encoder(cfg, "upload"),
        submodel=FederatedDropout(0.5),
    )
    state = averaging.initialize()
    for _ in range(2):
        before = state
        state, metrics = averaging.next(state, [client(i, 10) for i in range(2)])
        assert metrics["clients"] == 2
        assert not same(before.weights, state.weights)
    assert 0 < metrics["aggregated_bits"] < 2 * 8 * 110_000 * 4  # sub-models have 89,610 parameters


@dataclass(frozen=True)
class Largest(AdaptiveEncodingStage):
    """Reports the sum of its input: one for each message, and the largest."""

    def initial_state(self, spec):
        return {"stack": torch.zeros(1, dtype=torch.float64), "max": torch.tensor(0.0, dtype=torch.float64)}

    def params(self, state):
        return {"max": state["max"]}

    def update_spec(self, spec):
        one = TensorSpec((), torch.float64)
        return {"stack": StateUpdate(one, "stack"), "max": StateUpdate(one, "max")}

    def encode(self, x, key, params):
        return x, {}, {"stack": x.double().sum(), "max": x.double().sum()}

    def decode(self, y, side, spec, key, params):
        return y

    def update_state(self, state, aggregated):
        return aggregated


def test_reports_of_broadcasts_are_a_cohorts(parts, client, sent):
    encoder = StateDictEncoder(Encoder([Largest()], Raw()), 100)
    averaging = parts(0.5, broadcast=encoder, upload=encoder)
    state, metrics = averaging.next(averaging.initialize(), [client(i) for i in (3, 1, 4)])
    for direction, upload in ((state.broadcast, False), (state.upload, True)):
        sums = [float(sent[i, upload][2]["conv.weight"].double().sum()) for i in (3, 1, 4)]
        assert direction["conv.weight/0/stack"].tolist() == pytest.approx(sums, rel=1e-12)
        assert float(direction["conv.weight/0/max"]) == pytest.approx(max(sums), rel=1e-12)
    # params are one double down for each direction, and reports are two doubles up; nobody sends reports of the
    # broadcast
    assert metrics["broadcast_bits"] == metrics["aggregated_bits"] == 8 * sum(len(sent[i, True][0]) for i in (3, 1, 4))
    exact = parts(0.5)
    plain, plain_metrics = exact.next(exact.initialize(), [client(i) for i in (3, 1, 4)])
    assert same(state.weights, plain.weights)
    assert metrics["broadcast_bits"] - plain_metrics["broadcast_bits"] == 3 * 2 * 64 == 384


def test_differences_from_the_initial_weights_are_the_parts_own(parts, client, sent):
    reference = replace(UINT8, reference="initial")
    averaging = parts(0.5, broadcast=reference)
    start = averaging.initialize()
    state, _ = averaging.next(start, [client(0), client(1)])
    again, _ = averaging.next(start, [client(0), client(1)])
    assert same(state.weights, again.weights)
    # the first round sends no difference: all tensors are exact
    exact, _ = parts(0.5).next(start, [client(0), client(1)])
    assert same(state.weights, exact.weights)
    averaging.next(state, [client(0)])
    message, key, part = sent[0, False]
    initial = {
        name: torch.as_tensor(start.weights[name].numpy()[np.ix_(*own)])
        for name, own in places(Key(0, 1, 0), 0.5).items()
    }
    received, _ = reference.bind(schema_of(part)).decode(message, key, reference=initial)
    for name, value in part.items():
        bound = float((value - initial[name]).float().abs().max()) / 100  # two of 256 steps from minimum to maximum
        torch.testing.assert_close(received[name], value, rtol=0, atol=bound + 1e-7)


def test_it_goes_on_from_a_checkpoint_bit_for_bit(parts, client, tmp_path):
    def build():
        server = partial(torch.optim.Adam, lr=0.01)
        return parts(0.5, broadcast=POWERSGD, upload=POWERSGD, server=server, guard=NormGuard("clip"))

    def go_on(state, rounds):
        averaging = build()
        for _ in range(rounds):
            state, _ = averaging.next(state, [client(i) for i in range(3)])
        return state

    half = go_on(build().initialize(), 2)
    loaded, _ = checkpoint.load(checkpoint.save(half, {}, tmp_path, 1))
    whole, resumed = go_on(build().initialize(), 4), go_on(loaded, 2)
    assert same(whole.weights, resumed.weights)
    for direction in ("broadcast", "upload"):
        assert same(getattr(whole, direction), getattr(resumed, direction))
    assert (whole.broadcasted_bits, whole.norm) == (resumed.broadcasted_bits, resumed.norm)


def test_the_guards_norm_is_that_of_the_parts_update(parts, client, sent):
    averaging = parts(0.5, guard=NormGuard("clip"))
    state, _ = averaging.next(averaging.initialize(), [client(0)])
    update = [tensor for tensor in sent[0, True][2].values() if tensor.is_floating_point()]
    assert state.norm == pytest.approx(math.sqrt(sum(float(t.double().square().sum()) for t in update)), rel=1e-5)


def test_who_is_dropped_has_no_weight(parts, client):
    def bright() -> Examples:
        x, y = client(9, 40).load()
        return Examples(1000 * x, y)

    averaging = parts(0.5, guard=NormGuard("drop", initial=1.0))
    start = averaging.initialize()
    state, metrics = averaging.next(start, [client(0), client(1), Client(9, bright)])
    without, _ = averaging.next(start, [client(0), client(1)])
    assert metrics["clients_failed/outlier"] == 1
    assert same(state.weights, without.weights)


def test_weights_that_are_no_numbers_are_not_sent(parts, client):
    averaging = parts(0.5)
    state = averaging.initialize()
    weights = state.weights | {"out.bias": torch.full((10,), float("inf"))}
    with pytest.raises(Diverged, match="round 1: tensor 'out.bias' holds NaN or infinity"):
        averaging.next(replace(state, weights=weights), [client(0)])


def test_evaluation_is_of_the_whole_model(parts, client):
    averaging, plain = parts(0.3), parts(1.0)
    state, _ = averaging.next(averaging.initialize(), [client(0)])
    assert averaging.evaluate(state, client(8).load()) == plain.evaluate(state, client(8).load())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"broadcast": StateDictEncoder(reference="last")}, "run.submodel: reference=last"),
        ({"broadcast": ErrorFeedback(StateDictEncoder())}, "run.submodel: error_feedback"),
        ({"upload": ErrorFeedback(StateDictEncoder())}, "run.submodel: error_feedback"),
        ({"client": LocalTraining(lr=0.1, structured=True)}, "run.submodel: client.structured"),
        ({"algorithm": Scaffold()}, "run.submodel: algorithm=scaffold needs clients that train the whole model"),
    ],
)
def test_what_cannot_be_had_with_parts_is_refused(parts, changes, message):
    with pytest.raises(FedqError, match=message):
        parts(0.5, **changes)


def test_a_model_that_does_not_tell_its_units_is_refused(process, tiny):
    with pytest.raises(FedqError, match="run.submodel: Tiny cannot be trained in parts: it has no attribute `units`"):
        process(submodel=FederatedDropout(0.5))

    class Wrong(tiny):
        units: ClassVar = {}

    for place in (("nothing.weight", 0), ("big.bias", 1), ("small.bias", 0)):
        Wrong.units = {"big": (("big.weight", 0), place)}
        with pytest.raises(FedqError, match=rf"run.submodel: units\['big'\] of Wrong: '{place[0]}' has no such axis"):
            process(model=Wrong, submodel=FederatedDropout(0.5))


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.01, math.nan])
def test_a_share_is_above_0_and_at_most_1(keep):
    with pytest.raises(ValueError, match="keep must be .*above 0 and at most 1"):
        FederatedDropout(keep)
