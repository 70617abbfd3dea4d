"""Compares each task's loss and metrics with the mathematics, in numpy, and checks the errors of tasks."""

import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedq.data import Client, Examples
from fedq.encoding import Key, MessageError
from fedq.errors import FedqError
from fedq.learning import (
    Classification,
    FedAvg,
    FederatedAveraging,
    LocalTraining,
    Multilabel,
    NextToken,
    Registered,
    Regression,
    TaskError,
    TooFewClients,
    TrainingMetrics,
    evaluate,
)
from fedq.learning.evaluation import check
from fedq.learning.task import check_works, outputs_of
from fedq.simulation.workers import Workers

PAD, VOCABULARY, PLACES = 0, 12, 7


class Letters(nn.Module):
    """Logits of shape (N, T, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.letters(x))


class Dense(nn.Module):
    """Outputs of shape (N, outputs)."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(20, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sequences(seed: int, n: int = 30) -> Examples:
    """Sequences of different lengths, filled up with padding."""
    x = torch.randint(1, VOCABULARY, (n, PLACES + 1), generator=draw(seed))
    lengths = torch.randint(1, PLACES + 2, (n, 1), generator=draw(seed + 1))
    x = torch.where(torch.arange(PLACES + 1) < lengths, x, PAD)
    return Examples(x[:, :-1], x[:, 1:].contiguous())


def labels(seed: int, n: int = 30, outputs: int = 5) -> Examples:
    x = torch.randn(n, 20, generator=draw(seed))
    return Examples(x, (torch.rand(n, outputs, generator=draw(seed + 1)) < 0.3).float())


def numbers(seed: int, n: int = 30, outputs: int = 5) -> Examples:
    x = torch.randn(n, 20, generator=draw(seed))
    return Examples(x, x[:, :outputs] + torch.randn(n, outputs, generator=draw(seed + 1)))


def classes(seed: int, n: int = 30) -> Examples:
    return Examples(torch.randn(n, 20, generator=draw(seed)), torch.randint(10, (n,), generator=draw(seed + 1)))


CASES = {
    "classification": (Classification(), Dense, classes),
    "next_token": (NextToken(PAD, special=[1, 2]), Letters, sequences),
    "multilabel": (Multilabel(), partial(Dense, 5), labels),
    "regression": (Regression(), partial(Dense, 5), numbers),
    "huber": (Regression("huber", 0.5), partial(Dense, 5), numbers),
}


def built(task, model, map=map, **changes):
    training = LocalTraining(**{"lr": 0.1, "batch_size": 8} | changes)
    return FederatedAveraging(model, training, partial(torch.optim.SGD, lr=1.0), task=task, map=map)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(name, z, y):
    """Returns the metrics of outputs `z` and targets `y`, float64 arrays, computed without fedq's sums."""
    if name in ("classification", "next_token"):
        z, y = z.reshape(-1, z.shape[-1]), y.ravel().astype(int)
        if name == "next_token":
            z, y = z[y != PAD], y[y != PAD]
        loss = -np.log(softmax(z)[np.arange(len(y)), y]).mean()
        right = z.argmax(1) == y
        metrics = {"loss": loss, "accuracy": right.mean()}
        if name == "next_token":
            usual = ~np.isin(y, [PAD, 1, 2])
            metrics |= {"accuracy_without_special": right[usual].mean(), "perplexity": np.exp(loss)}
        return metrics
    if name == "multilabel":
        p = 1 / (1 + np.exp(-z))
        loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        tp, fp, fn = ((p > 0.5) & (y == 1)).sum(), ((p > 0.5) & (y == 0)).sum(), ((p <= 0.5) & (y == 1)).sum()
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        found = []
        for label in range(y.shape[1]):
            area, last = 0.0, 0.0
            for threshold in np.arange(199, -1, -1) / 200:
                shown = p[:, label] >= threshold
                if shown.any():
                    now = y[shown, label].sum() / y[:, label].sum()
                    area, last = area + (now - last) * y[shown, label].mean(), now
            found.append(area)
        f1 = 2 * precision * recall / (precision + recall)
        return {"loss": loss, "micro_f1": f1, "mean_average_precision": np.mean(found)}
    error = np.abs(z - y)
    loss = error**2 if name == "regression" else np.where(error < 0.5, error**2 / 2, 0.5 * (error - 0.25))
    r2 = 1 - ((z - y) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    return {"loss": loss.mean(), "mae": error.mean(), "r2": r2.mean()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [7, 50, 1000])
def test_metrics_are_the_textbooks(name, batch):
    task, model, data = CASES[name]
    torch.manual_seed(0)
    model, examples = model().eval(), data(3, 101)
    with torch.no_grad():
        outputs = model(examples.x).double().numpy()
    found = evaluate(model, examples, batch, task=task)
    expected = by_hand(name, outputs, examples.y.double().numpy())
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_training_reports_the_same_sums_and_takes_steps_of_the_mean_loss(name):
    task, model, data = CASES[name]
    torch.manual_seed(0)
    network, reference, examples = model(), model(), data(5, 20)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    reference.load_state_dict(start)
    trained = LocalTraining(lr=0.1, batch_size=8).train(network, start, examples, Key(3), task=task)
    order, outputs = LocalTraining(lr=0.1).chosen(20, Key(3)), []
    for places in np.split(order, (8, 16)):
        z, y = reference(examples.x[places]), examples.y[places]
        outputs.append((z.detach().double().numpy(), y.double().numpy()))
        if name == "next_token":  # torch's mean also leaves out ignored targets
            loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=PAD)
        else:
            losses = {
                "classification": F.cross_entropy,
                "multilabel": F.binary_cross_entropy_with_logits,
                "regression": F.mse_loss,
                "huber": partial(F.huber_loss, delta=0.5),
            }
            loss = losses[name](z, y)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-6, atol=1e-7)
    expected = by_hand(name, *(np.concatenate(part) for part in zip(*outputs, strict=True)))
    found = task.metrics(trained.sums)
    assert found.keys() >= {"loss", task.headline}
    assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_workers_change_nothing(name):
    task, model, data = CASES[name]
    results = []
    for count in (1, 4):
        with Workers(count) as workers:
            process = built(task, model, workers.map)
            state = process.initialize()
            for _ in range(2):
                clients = [Client(i, partial(data, i, 20 + i)) for i in range(5)]
                state, metrics = process.next(state, clients)
            metrics = {key: value for key, value in metrics.items() if "seconds" not in key}
            results.append((metrics, process.evaluate(state, data(99, 333), 10)))
    assert results[0] == results[1]
    assert {f"train/{task.headline}", "train/loss"} <= results[0][0].keys()


def test_reports_of_classification_have_80_bytes_and_others_name_their_counts():
    for name, length in (("classification", 80), ("next_token", 88), ("multilabel", 104), ("regression", 88)):
        task, model, _ = CASES[name]
        protocol = built(task, model).protocol
        sums = dict.fromkeys((*task.reported, "targets"), 0)
        assert len(protocol.reports.write(TrainingMetrics({"loss": 1.0} | sums, 8, 1), Key(0, 0, 1))) == length


@pytest.mark.parametrize(
    ("name", "sums"),
    [
        ("next_token", {"targets": 41}),
        ("next_token", {"targets": 39}),
        ("next_token", {"correct": 41}),
        ("multilabel", {"hits": 11}),
        ("multilabel", {"predicted": 41}),
        ("multilabel", {"positive": 4}),
        ("regression", {"absolute_error": -1.0}),
        ("regression", {"targets": 0}),
        ("classification", {"correct": 9}),
    ],
)
def test_sums_that_no_training_gives_are_refused(name, sums):
    task, model, _ = CASES[name]
    protocol, key = built(task, model).protocol, Key(0, 0, 1)
    right = {"targets": 40, "correct": 5, "hits": 5, "predicted": 10, "positive": 10, "absolute_error": 1.0}
    registered = Registered(8, 8 if name == "classification" else 40)
    for changes in ({}, sums):
        report = protocol.reports.write(TrainingMetrics({"loss": 1.0} | right | changes, 8, 1), key)
        if changes:
            with pytest.raises(MessageError, match="no training gives the report"):
                protocol.reports.read(report, key, registered)
        else:
            assert protocol.reports.read(report, key, registered).seen == 8


@pytest.mark.parametrize(("loss", "taken"), [(2.7e39, True), (2.8e39, False), (1e308, False)])
def test_a_loss_of_eight_targets_beyond_eight_times_the_largest_float32_is_refused(loss, taken):
    task, model, _ = CASES["classification"]
    protocol, key = built(task, model).protocol, Key(0, 0, 1)
    report = protocol.reports.write(TrainingMetrics({"loss": loss, "targets": 8, "correct": 5}, 8, 1), key)
    with nullcontext() if taken else pytest.raises(MessageError, match="no training gives the report"):
        assert protocol.reports.read(report, key, Registered(8, 8)).sums["loss"] == loss


# padding


def padded(examples: Examples, more: int) -> Examples:
    return Examples(*(F.pad(part, (0, more), value=PAD) for part in examples))


def test_padding_counts_nowhere():
    """More padding changes no metric, no weight and no step."""
    results = []
    for more in (0, 9):
        process = built(NextToken(PAD, special=[1]), Letters, weight="targets")
        clients = [Client(i, partial(lambda i, more: padded(sequences(i, 16), more), i, more)) for i in range(3)]
        state, metrics = process.next(process.initialize(), clients)
        results.append((state.weights, metrics, process.evaluate(state, padded(sequences(9), more))))
    (weights, metrics, tested), (others, other_metrics, other_tested) = results
    assert tested == pytest.approx(other_tested, rel=1e-6)
    assert metrics["train/accuracy"] == other_metrics["train/accuracy"]
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_target_that_counts_changes_nothing():
    task, model = NextToken(PAD), Letters()
    x, nothing = torch.ones(8, PLACES, dtype=torch.int64), torch.full((8, PLACES), PAD)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trained = LocalTraining(lr=0.1, batch_size=4).train(model, start, Examples(x, nothing), Key(0), task=task)
    assert trained.sums == {"loss": 0.0, "targets": 0, "correct": 0}
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    process = built(task, Letters, batch_size=4)
    some = Examples(x, nothing.index_fill(0, torch.tensor([2]), 3))
    _, metrics = process.next(
        process.initialize(),
        [Client(0, lambda: Examples(x, nothing)), Client(1, lambda: some), Client(2, lambda: some)],
    )
    assert (metrics["clients"], metrics["clients_failed/unable"]) == (2, 1)
    assert math.isfinite(metrics["train/loss"])
    with pytest.raises(FedqError, match="no target of the test set counts"):
        process.evaluate(process.initialize(), Examples(x, nothing))


def test_without_padding_all_tokens_count():
    y, task = sequences(1).y, NextToken(padding=None)
    assert task.count(y) == y.numel() > NextToken(PAD).count(y)
    loss = float(task.loss(F.one_hot(y, VOCABULARY).float(), y))
    assert loss == pytest.approx(math.log(math.e + VOCABULARY - 1) - 1, rel=1e-6)


def test_minus_100_may_be_the_padding():
    x, y = sequences(1)
    process = built(NextToken(-100), Letters)
    state = process.initialize()
    marked = Examples(x, torch.where(y == PAD, -100, y))
    assert process.evaluate(state, marked) == built(NextToken(PAD), Letters).evaluate(state, Examples(x, y))


# edges


def test_labels_that_no_example_has_are_left_out_of_average_precision():
    outputs, targets = torch.tensor([[2.0, 1.0], [-1.0, 0.5], [0.3, 0.1]]), torch.tensor([[1, 0], [0, 0], [1, 0]])
    task = Multilabel()
    sums = {"loss": 1.0, "targets": 6, **task.test_sums(outputs, targets)}
    assert task.metrics(sums)["mean_average_precision"] == 1.0
    nothing = {"loss": 1.0, "targets": 6, **task.test_sums(-outputs.abs(), 0 * targets)}
    assert task.metrics(nothing)["micro_f1"] == 0
    assert "mean_average_precision" not in task.metrics(nothing)


def test_probabilities_of_0_and_1_are_in_the_outer_bins():
    outputs, targets = torch.tensor([[99.0, 99.0], [-99.0, -99.0]]), torch.tensor([[1, 0], [0, 1]])
    task = Multilabel(bins=4)
    sums = {"loss": 1.0, "targets": 4, **task.test_sums(outputs, targets)}
    # absent and present, for each label
    assert sums["histogram"].tolist() == [[[1, 0, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 1], [1, 0, 0, 0]]]
    assert task.metrics(sums)["mean_average_precision"] == (1 + 1 / 2) / 2
    diverged = task.test_sums(torch.full((2, 2), math.nan), targets)
    assert int(diverged["histogram"].sum()) == 4


def test_constant_targets_that_no_float_holds_do_not_vary():
    targets, outputs = torch.full((101, 2), 0.1, dtype=torch.float64), torch.zeros(101, 2)
    targets[:, 1] = 1e3 + torch.arange(101)
    outputs[:, 1] = 1e3 + torch.arange(101)
    task = Regression()
    assert task.metrics({"loss": 1.0, "targets": 202, **task.test_sums(outputs, targets)})["r2"] == 1.0
    constant = {"loss": 1.0, "targets": 101, **task.test_sums(outputs[:, :1], targets[:, :1])}
    assert task.metrics(constant).keys() == {"loss", "mae"}


@pytest.mark.parametrize("task", [Regression(), Regression("huber", delta=0.3)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e9])
def test_no_loss_goes_with_a_larger_error(task, size):
    outputs, targets = size * torch.randn(50, 3, generator=draw(1)), torch.zeros(50, 3)
    sums = {"targets": 150, "loss": float(task.loss(outputs, targets)) * 150}
    error = float(task.sums(outputs, targets)["absolute_error"])
    assert task.can_give(sums | {"absolute_error": error})
    equal = torch.full((50, 3), size)  # an error that is the same everywhere is the largest error of a squared loss
    sums = {"targets": 150, "loss": float(task.loss(equal, targets)) * 150}
    assert task.can_give(sums | {"absolute_error": 150 * size})
    assert not task.can_give(sums | {"absolute_error": 150 * (1.4 * size + 0.2)})


def test_more_labels_than_targets_cannot_be_predicted_or_present():
    sums = {"loss": 1.0, "targets": 40, "predicted": 30, "positive": 30}
    assert Multilabel().can_give(sums | {"hits": 20})
    assert not Multilabel().can_give(sums | {"hits": 19})


@pytest.mark.parametrize("order", [1, -1])
def test_a_metric_that_one_client_lacks_is_the_mean_over_the_others(order):
    tokens = torch.randint(1, 9, (4, PLACES), generator=draw(2))
    both = [(0, Examples(tokens, torch.full((4, PLACES), 5))), (1, Examples(tokens, tokens))][::order]
    averaging = FederatedAveraging(
        Letters,
        LocalTraining(lr=0.1),
        partial(torch.optim.SGD, lr=1.0),
        task=NextToken(PAD, special=[5]),
        algorithm=FedAvg(personal=["letters.*"]),
    )
    state = averaging.initialize()
    found = averaging.evaluate(state, both[0][1], clients=both)
    alone = [averaging.evaluate(state, its, clients=[(number, its)]) for number, its in both]
    other = next(one for one in alone if "accuracy_without_special" in one)
    assert found["accuracy_without_special"] == other["accuracy_without_special"]
    assert found["loss"] == pytest.approx(sum(one["loss"] for one in alone) / 2)


def test_outputs_that_do_not_vary_are_left_out_of_r2():
    outputs = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 3.0]])
    targets = torch.tensor([[5.0, 1.0], [5.0, 2.0], [5.0, 3.0]])
    task = Regression()
    sums = {"loss": 1.0, "targets": 6, **task.test_sums(outputs, targets)}
    assert task.metrics(sums)["r2"] == 1.0


def test_one_output_goes_with_targets_of_one_axis():
    """With broadcasting, (N, 1) − (N,) would have the shape (N, N)."""
    x, y = numbers(1, 40, 1)
    for task, targets in ((Regression(), y), (Multilabel(), (y > 0).float())):
        process = built(task, partial(Dense, 1))
        state = process.initialize()
        flat, wide = (process.evaluate(state, Examples(x, part)) for part in (targets[:, 0], targets))
        assert flat == wide
        _, metrics = process.next(state, [Client(0, lambda targets=targets: Examples(x, targets[:, 0]))])
        assert metrics["clients"] == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float64])
def test_labels_may_have_any_dtype(dtype):
    x, y = labels(4)
    process = built(Multilabel(), partial(Dense, 5))
    state, _ = process.next(process.initialize(), [Client(0, lambda: Examples(x, y.to(dtype)))])
    expected, _ = process.next(process.initialize(), [Client(0, lambda: Examples(x, y))])
    assert all(torch.equal(value, expected.weights[name]) for name, value in state.weights.items())
    assert process.evaluate(state, Examples(x, y.to(dtype))) == process.evaluate(expected, Examples(x, y))


def test_an_object_with_logits_is_taken():
    class Wrapped(Dense):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x), hidden=x)

    plain, wrapped = built(Classification(), Dense), built(Classification(), Wrapped)
    states = [p.next(p.initialize(), [Client(0, partial(classes, 0))])[0] for p in (plain, wrapped)]
    assert all(torch.equal(value, states[1].weights[name]) for name, value in states[0].weights.items())
    assert plain.evaluate(states[0], classes(1)) == wrapped.evaluate(states[1], classes(1))
    assert outputs_of(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert outputs_of(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


# examples and outputs that do not fit


class Tuple(Dense):
    def forward(self, x):
        return super().forward(x), x


class Dict(Dense):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Axis(Dense):
    def forward(self, x):
        return super().forward(x)[:, :, None]


class OneForAll(Dense):
    def forward(self, x):
        return super().forward(x).mean(0)[None]


class Integers(Dense):
    def forward(self, x):
        return super().forward(x).long()


X, Y = classes(0)
SEQUENCES = sequences(0)
REFUSED = {
    "sequences": (Classification(), Letters, SEQUENCES, r"outputs of shape \(8, 7, 12\) .* targets of shape \(30, 7\)"),
    "float labels": (Classification(), Dense, Examples(X, Y.float()), r"targets of shape \(30,\) and dtype float32"),
    "int32": (Classification(), Dense, Examples(X, Y.int()), "dtype int32"),
    "uint8": (Classification(), Dense, Examples(X, Y.byte()), "dtype uint8"),
    "bool": (Classification(), Dense, Examples(X, Y > 4), "dtype bool"),
    "(N, 1)": (Classification(), Dense, Examples(X, Y[:, None]), r"targets of shape \(30, 1\)"),
    "one hot": (Classification(), Dense, Examples(X, F.one_hot(Y, 10)), r"targets of shape \(30, 10\)"),
    "soft": (Classification(), Dense, Examples(X, F.one_hot(Y, 10).double()), "dtype float64"),
    "five": (
        Classification(),
        partial(Dense, 5),
        Examples(X, Y),
        "from 0 to 4, because the model has 5 .* from 0 to 9",
    ),
    "one logit": (Classification(), partial(Dense, 1), Examples(X, 0 * Y), r"at least two classes.* \(8, 1\)"),
    "-100": (Classification(), Dense, Examples(X, torch.where(Y == 3, -100, Y)), "targets are from -100 to 9"),
    "ten": (Classification(), Dense, Examples(X, torch.where(Y == 3, 10, Y)), "from 0 to 9, .* from 0 to 10"),
    "tuple": (Classification(), Tuple, Examples(X, Y), "the model returns a tuple: .* as .logits of an object"),
    "dict": (Classification(), Dict, Examples(X, Y), "the model returns a dict"),
    "axis": (Classification(), Axis, Examples(X, Y), r"outputs of shape \(8, 10, 1\)"),
    "one for all": (Classification(), OneForAll, Examples(X, Y), r"outputs of shape \(1, 10\) .* for 8 examples"),
    "integers": (Classification(), Integers, Examples(X, Y), r"returns a tensor of shape \(8, 10\) and dtype int64"),
    "arrays": (Classification(), Dense, Examples(X.numpy(), Y.numpy()), "two tensors .* not ndarray and ndarray"),
    "39 inputs": (Classification(), Dense, Examples(X[1:], Y), "29 inputs but 30 targets"),
    "41 inputs": (Classification(), Dense, Examples(torch.cat([X, X[:1]]), Y), "31 inputs but 30 targets"),
    "token": (NextToken(), Letters, Examples(SEQUENCES.x, SEQUENCES.y + 1), "from 0 to 11, .* to 12"),
    "flat tokens": (NextToken(), Letters, Examples(SEQUENCES.x, SEQUENCES.y[:, 0]), r"targets of shape \(30,\)"),
    "int32 tokens": (NextToken(), Letters, Examples(SEQUENCES.x, SEQUENCES.y.int()), "dtype int32"),
    "classes": (NextToken(), Dense, Examples(X, Y), r"\(N, T, vocabulary\)"),
    "shares": (Multilabel(), partial(Dense, 5), Examples(X, 0.5 * labels(0).y), "0 or 1, not .* with other values"),
    "four labels": (Multilabel(), partial(Dense, 5), Examples(X, labels(0).y[:, 1:]), r"\(8, 5\).* \(30, 4\)"),
    "integers to estimate": (Regression(), partial(Dense, 1), Examples(X, Y), "floating targets .* dtype int64"),
    "four numbers": (Regression(), partial(Dense, 5), Examples(X, numbers(0).y[:, 1:]), r"\(8, 5\).* \(30, 4\)"),
    "NaN": (Regression(), partial(Dense, 5), Examples(X, numbers(0).y / 0), "with NaN or infinity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_said_once_and_is_no_clients_fault(name):
    task, model, examples, sentence = REFUSED[name]
    process = built(task, model)
    state = process.initialize()
    with pytest.raises(TaskError, match=f"with the examples of client 0: .*{sentence}") as error:
        process.next(state, [Client(number, lambda: examples) for number in range(4)])
    assert not isinstance(error.value, TooFewClients)
    assert str(error.value).count("client ") == 1
    with pytest.raises(TaskError, match=sentence):
        process.evaluate(state, examples, 8)


IMAGES = torch.zeros(3, 16, 16, 3)
HINTS = {
    "uint8": (Examples(IMAGES.byte(), Y[:3]), r"give x.float\(\) / 255"),
    "double": (Examples(X.double(), Y), r"give x.float\(\)$"),
    "channels last": (Examples(IMAGES, Y[:3]), r"give x.permute\(0, 3, 1, 2\)"),
    "a column": (Examples(X, Y[:, None]), r"give y.squeeze\(1\)"),
    "int32": (Examples(X, Y.int()), r"give y.long\(\)"),
    "not finite": (Examples(X / 0, Y), "the inputs hold NaN or infinity"),
}


@pytest.mark.parametrize("name", HINTS)
def test_what_newcomers_get_wrong_is_told_with_a_remedy(name):
    examples, sentence = HINTS[name]
    with pytest.raises(TaskError, match=f"with the examples of client 0: .*{sentence}"):
        check(Dense(5), "client 0", examples, Classification())


class Means(Classification):
    def sums(self, outputs, targets):
        return {"correct": (outputs.argmax(1) == targets).float().mean()}


class MeanLoss(Classification):
    def loss(self, outputs, targets, reduction="mean"):
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [(Means(), "'correct' of sums.. of Means must be a sum"), (MeanLoss(), "loss.*of MeanLoss must be a sum")],
)
def test_a_mean_in_place_of_a_sum_is_told(task, sentence):
    outputs = torch.eye(2)
    check_works(Classification(), outputs, torch.arange(2))
    with pytest.raises(TaskError, match=sentence):
        check_works(task, outputs, torch.arange(2))


def test_a_tasks_count_of_targets_must_travel_if_it_is_not_that_of_examples():
    class Forgetful(NextToken):
        reported = {"correct": int}  # noqa: RUF012

    process = built(Forgetful(), Letters)
    with pytest.raises(TaskError, match='reported must have "targets": int'):
        process.next(process.initialize(), [Client(0, lambda: SEQUENCES)])


# weights


@pytest.mark.parametrize("weight", ["examples", "targets", "uniform"])
@pytest.mark.parametrize("most", [None, 10])
def test_a_clients_weight(weight, most):
    """The mean of updates has the weights that `weight` asks for, of the examples that clients use."""
    task, sizes = NextToken(PAD), {4: 9, 7: 24, 1: 16}
    process = built(task, Letters, weight=weight, max_examples=most)
    start = process.initialize()
    state, _ = process.next(start, [Client(number, partial(sequences, number, n)) for number, n in sizes.items()])
    updates, weights = [], []
    for number, n in sizes.items():
        model, examples, key = Letters(), sequences(number, n), Key(0, 0, number).fold("train")
        training = LocalTraining(lr=0.1, batch_size=8, max_examples=most)
        training.train(model, start.weights, examples, key, task=task)
        updates.append({name: value - start.weights[name] for name, value in model.state_dict().items()})
        used = examples.y[key.fold("shuffle").fold("0").permutation(n)[:most]]
        weights.append({"examples": len(used), "targets": int((used != PAD).sum()), "uniform": 1}[weight])
    for name, value in start.weights.items():
        mean = sum(w * update[name].double() for w, update in zip(weights, updates, strict=True)) / sum(weights)
        torch.testing.assert_close(state.weights[name].double(), value.double() + mean, rtol=1e-6, atol=1e-6)


def test_no_other_weight_is_taken():
    with pytest.raises(ValueError, match="weight must be examples, targets or uniform, not 'labels'"):
        LocalTraining(lr=0.1, weight="labels")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NextToken(padding=0.5), "padding must be an integer"),
        (lambda: NextToken(special=[-1]), "special: an id must be at least 0"),
        (lambda: Multilabel(bins=0), "bins must be at least 1"),
        (lambda: Regression("mae"), "loss must be mse or huber"),
        (lambda: Regression("huber", 0.0), "delta must be above 0"),
    ],
)
def test_arguments_out_of_range(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_the_check_of_examples_leaves_the_model_as_it_is():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    model = Counting()
    check(model, "client 0", Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), Classification())
    assert model.calls == 0
    assert model.training
