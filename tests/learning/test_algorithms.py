"""Compares SCAFFOLD and FedNova with numpy implementations of their papers that share no code with fedq."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from fedq.data import Client, Examples
from fedq.encoding import BitBudget, Encoder, FixedWidth, Key, RandomMask, StateDictEncoder, UniformQuantization
from fedq.errors import FedqError
from fedq.learning import (
    Diverged,
    ErrorFeedback,
    FedAvg,
    FederatedAveraging,
    FederatedDropout,
    FedNova,
    LocalTraining,
    Scaffold,
)
from fedq.learning.guard import NormGuard
from fedq.simulation.client_state_files import ClientStateFiles

FEATURES, CLASSES, CLIENTS = 6, 4, 5
UINT4 = StateDictEncoder(Encoder([UniformQuantization(4)], FixedWidth()), threshold=0)


class Softmax(nn.Linear):
    """Softmax regression in float64."""

    def __init__(self) -> None:
        super().__init__(FEATURES, CLASSES, dtype=torch.float64)


def examples(client: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a skewed client's examples: two classes only, with another number and other inputs for each client."""
    draw = np.random.default_rng(client)
    n = 12 + 7 * client
    return draw.normal(client / 3, 1, (n, FEATURES)), (client + draw.integers(2, size=n)) % CLASSES


def make(client: int) -> Client:
    x, y = map(torch.from_numpy, examples(client))
    return Client(client, lambda: Examples(x, y), len(y))


class Parted(Softmax):
    """A group of units for federated dropout: the classes."""

    units = MappingProxyType({"classes": (("weight", 0), ("bias", 0))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return torch.nn.functional.pad(logits, (0, CLASSES - logits.shape[1]))


def process(
    algorithm: FedAvg, training: LocalTraining, model: type[nn.Module] = Softmax, **more: object
) -> FederatedAveraging:
    server = partial(torch.optim.SGD, lr=0.7)
    return FederatedAveraging(model, training, server, algorithm=algorithm, population=CLIENTS, **more)


def gradient(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the gradient of the mean cross entropy; `weights` are (CLASSES, FEATURES + 1), the bias last."""
    inputs = np.c_[x, np.ones(len(x))]
    logits = inputs @ weights.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p.T @ inputs / len(y)


def as_array(tensors: dict[str, torch.Tensor], prefix: str = "") -> np.ndarray:
    return np.c_[tensors[f"{prefix}weight"].numpy(), tensors[f"{prefix}bias"].numpy()]


COHORTS = [[(round_ + 2 * i) % CLIENTS for i in range(3)] for round_ in range(20)]


def test_scaffold_is_the_papers() -> None:
    """Karimireddy 2020, algorithm 1, option II, with full batches, five local steps and three of five clients."""
    rate, steps = 0.3, 5
    run = process(Scaffold(), LocalTraining(lr=rate, epochs=steps, batch_size=1000))
    state = run.initialize()
    x, c = as_array(state.weights), np.zeros((CLASSES, FEATURES + 1))
    own = {client: np.zeros_like(c) for client in range(CLIENTS)}
    for cohort in COHORTS:
        state, metrics = run.next(state, [make(client) for client in cohort])
        changes, updates = [], []
        for client in cohort:
            y = x.copy()
            for _ in range(steps):
                y -= rate * (gradient(y, *examples(client)) - own[client] + c)
            after = own[client] - c + (x - y) / (steps * rate)
            changes.append(after - own[client])
            updates.append(y - x)
            own[client] = after
        x = x + 0.7 * np.mean(updates, axis=0)
        c = c + len(cohort) / CLIENTS * np.mean(changes, axis=0)
        assert metrics["clients_failed"] == 0
    np.testing.assert_allclose(as_array(state.weights), x, atol=1e-6)
    np.testing.assert_allclose(as_array(state.groups, "*control/"), c, atol=1e-6)
    assert min(np.abs(one).max() for one in own.values()) > 0.05  # with variates of 0 this would be FedAvg


def test_control_variates_follow_what_the_server_decoded() -> None:
    """With four bits both ways, c is the mean of all c_i: clients add the decoded values, not the computed ones."""
    run = process(Scaffold(), LocalTraining(lr=0.3, epochs=5, batch_size=1000), broadcast=UINT4, upload=UINT4)
    state = run.initialize()
    for cohort in COHORTS[:6]:
        state, _ = run.next(state, [make(client) for client in cohort])
    kept = [run.store.load(client, 6, run.protocol.kept_schema) for client in range(CLIENTS)]
    mean = np.mean([as_array(own, "*control/") for own in kept], axis=0)
    np.testing.assert_allclose(as_array(state.groups, "*control/"), mean, atol=1e-9)


def test_control_variates_are_sent_encoded_and_counted_both_ways() -> None:
    alone, both = (
        process(algorithm, LocalTraining(lr=0.3), broadcast=UINT4, upload=UINT4) for algorithm in (FedAvg(), Scaffold())
    )
    clients = [make(0), make(1)]
    (_, one), (_, two) = (run.next(run.initialize(), clients) for run in (alone, both))
    # SCAFFOLD sends two messages of the same tensors instead of one
    assert two["broadcast_bits"] == 2 * one["broadcast_bits"]
    assert two["aggregated_bits"] == 2 * one["aggregated_bits"]
    assert two["report_bits"] == one["report_bits"] > 0


def test_a_client_that_sends_nothing_keeps_its_control_variate() -> None:
    def silent(message: bytes, key: Key) -> bytes:
        from fedq.learning import ClientFailure

        if key.client == 1 and key.round == 1:
            raise ClientFailure("silent", "it crashed")
        return message

    run = process(Scaffold(), LocalTraining(lr=0.3, epochs=3), network=silent)
    state, _ = run.next(run.initialize(), [make(0), make(1)])
    before = dict(run.store.load(1, 1, run.protocol.kept_schema))
    state, metrics = run.next(state, [make(0), make(1)])
    assert metrics["clients_failed/silent"] == 1
    after = run.store.load(1, 2, run.protocol.kept_schema)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_joined_tensors_of_weights_and_control_variates_are_told_apart() -> None:
    """A mask of all elements loses nothing: it does not matter whether tensors are joined."""
    apart, joined = (StateDictEncoder(Encoder([RandomMask(1.0)]), threshold=0, joint=joint) for joint in (False, True))
    states = []
    for way in (apart, joined):
        run = process(Scaffold(), LocalTraining(lr=0.3, epochs=3), broadcast=way, upload=way)
        state = run.initialize()
        for cohort in COHORTS[:3]:
            state, metrics = run.next(state, [make(client) for client in cohort])
            assert metrics["clients_failed"] == 0
        states.append(state)
    for tensors in ("weights", "groups"):
        one, other = (getattr(state, tensors) for state in states)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_rules_for_weights_are_for_their_control_variates_too() -> None:
    ruled = StateDictEncoder(threshold=0, rules={"[bw]*[!s]": UINT4.encoder})
    run = process(Scaffold(), LocalTraining(lr=0.3), broadcast=ruled, upload=ruled)
    for group in run.protocol.groups.values():
        for codec in (group.broadcast, group.upload):
            weight, bias = codec.schema
            assert (codec.chains[weight].encoder, codec.chains[bias].encoder) == (UINT4.encoder, Encoder())


def test_rate_control_follows_each_group_by_itself() -> None:
    """The first broadcast's control variates are all 0 and say nothing about the rate; its weights do."""
    budget = StateDictEncoder(UINT4.encoder, threshold=0, common_scale=True, rate_control=BitBudget(2.0))
    run = process(Scaffold(), LocalTraining(lr=0.3), broadcast=budget, upload=budget)
    state, _ = run.next(run.initialize(), [make(0), make(1)])
    factors = {name: float(value) for name, value in state.broadcast.items() if name.endswith("/factor")}
    assert factors.pop("*control/*pace/0/factor") == 1.0
    (factor,) = factors.values()
    assert factor > 1.0


def test_residuals_and_control_variates_are_kept_in_one_file(tmp_path: Path) -> None:
    store = ClientStateFiles(tmp_path / "clients", seed=0, memory=0)
    store.resume(0)
    states = []
    for more in ({"store": store}, {}):
        run = process(Scaffold(), LocalTraining(lr=0.3), upload=ErrorFeedback(UINT4), **more)
        state = run.initialize()
        for cohort in COHORTS[:4]:  # clients come twice
            state, _ = run.next(state, [make(client) for client in cohort])
        states.append(state)
    assert all(torch.equal(value, states[1].weights[name]) for name, value in states[0].weights.items())


@pytest.mark.parametrize("action", ["clip", "drop"])
def test_the_guard_sees_control_variates(action: str) -> None:
    """One client's update is honest, and the change of its control variate is enormous."""

    def lie(message: bytes, key: Key) -> bytes:
        codec = run.protocol.groups["control"].upload
        if key.client != 1 or not codec.expects(message, {}):
            return message
        huge = {name: torch.full(spec.shape, 1e10, dtype=spec.dtype) for name, spec in codec.schema.items()}
        return codec.encode(huge, key).message

    guard = NormGuard(action, initial=1.0)
    run = process(Scaffold(), LocalTraining(lr=0.3), guard=guard, network=lie)
    state = run.initialize()
    for _ in range(2):
        state, metrics = run.next(state, [make(client) for client in range(3)])
        assert metrics["clients_failed/outlier"] == (action == "drop")
    assert float(state.groups["*control/weight"].abs().max()) < 10


def test_control_variates_that_overflow_end_the_run_as_weights_do() -> None:
    run = process(Scaffold(), LocalTraining(lr=0.3))
    state = run.initialize()
    control = {name: torch.full_like(value, torch.inf) for name, value in state.groups.items()}
    with pytest.raises(Diverged, match=r"tensor '\*control/weight' holds NaN or infinity"):
        run.next(replace(state, groups=control), [make(0)])


def test_scaffold_refuses_structured_updates() -> None:
    with pytest.raises(FedqError, match=r"structured must be false with algorithm=scaffold: its corrections"):
        process(Scaffold(), LocalTraining(lr=0.3, structured=True))


@pytest.mark.parametrize("more", [{"momentum": 0.9}, {"proximal": 0.1}])
def test_scaffold_refuses_other_local_steps(more: dict[str, float]) -> None:
    with pytest.raises(FedqError, match=r"scaffold needs client\.momentum=0, client\.proximal=0"):
        process(Scaffold(), LocalTraining(lr=0.3, **more))


def test_scaffold_refuses_sub_models() -> None:
    with pytest.raises(FedqError, match="needs clients that train the whole model"):
        process(Scaffold(), LocalTraining(lr=0.3), submodel=FederatedDropout(0.5))


@pytest.mark.parametrize("more", [{}, {"momentum": 0.8}, {"proximal": 0.2}])
def test_fednova_is_the_papers(more: dict[str, float]) -> None:
    """Wang 2020, equations 6 to 9: the test follows the coefficient of each gradient through the local steps."""
    rate, batch = 0.2, 8
    run = process(FedNova(), LocalTraining(lr=rate, batch_size=batch, **more), seed=3)
    state = run.initialize()
    x = as_array(state.weights)
    momentum, proximal = more.get("momentum", 0.0), more.get("proximal", 0.0)
    for round_, cohort in enumerate(COHORTS[:4]):
        state, _ = run.next(state, [make(client) for client in cohort])
        normalised, works, sizes = [], [], []
        for client in cohort:
            inputs, labels = examples(client)
            order = Key(3, round_, client).fold("train").fold("shuffle").fold("0").permutation(len(labels))
            y, velocity, steps = x.copy(), np.zeros_like(x), 0
            coefficients: list[float] = []  # the coefficient of each gradient in (x − y) / rate
            speeds: list[float] = []
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                step = gradient(y, inputs[chosen], labels[chosen]) + proximal * (y - x)
                velocity = momentum * velocity + step
                y, steps = y - rate * velocity, steps + 1
                speeds = [momentum * speed for speed in speeds] + [1.0]
                coefficients = [(1 - rate * proximal) * c for c in coefficients] + [0.0]
                coefficients = [c + speed for c, speed in zip(coefficients, speeds, strict=True)]
                if proximal:
                    speeds = [0.0] * len(speeds)
            works.append(sum(coefficients))
            normalised.append((x - y) / works[-1])
            sizes.append(len(labels))
        share = np.array(sizes) / sum(sizes)
        x = x - 0.7 * (share @ works) * np.tensordot(share, normalised, 1)
        assert len(set(works)) > 1
    np.testing.assert_allclose(as_array(state.weights), x, atol=1e-9)


def test_fednova_refuses_momentum_with_a_proximal_term() -> None:
    with pytest.raises(FedqError, match="not both"):
        process(FedNova(), LocalTraining(lr=0.3, momentum=0.9, proximal=0.1))


def test_fednova_refuses_a_proximal_term_that_overshoots() -> None:
    with pytest.raises(FedqError, match=r"client\.lr · client\.proximal below 1"):
        process(FedNova(), LocalTraining(lr=2.0, proximal=1.0))


def test_fednova_with_one_client_is_federated_averaging_also_with_sub_models() -> None:
    """With one client the mean of all a_i is its own."""
    updates = []
    for algorithm in (FedAvg(), FedNova()):
        run = process(algorithm, LocalTraining(lr=0.3, batch_size=2), model=Parted, submodel=FederatedDropout(0.5))
        state, _ = run.next(run.initialize(), [make(3)])
        updates.append(state.weights["weight"] - run.protocol.initial["weight"])
    torch.testing.assert_close(updates[0], updates[1])
    assert updates[0].any()


class Counting(Softmax):
    """Has a large floating buffer, which the joint vector takes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(20_000, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(x)


def test_fednova_scales_no_buffer() -> None:
    everything = Encoder([RandomMask(1.0)])
    run = process(FedNova(), LocalTraining(lr=0.3, batch_size=2), Counting, upload=StateDictEncoder(everything))
    state, _ = run.next(run.initialize(), [make(0)])
    assert state.weights["seen"].unique().tolist() == [6.0]
    joint = StateDictEncoder(everything, threshold=0, joint=True)
    with pytest.raises(FedqError, match="joint must be false with algorithm=fednova: .* the buffer 'seen'"):
        process(FedNova(), LocalTraining(lr=0.3), Counting, upload=joint)
    process(FedNova(), LocalTraining(lr=0.3), Softmax, upload=joint)
    process(FedNova(), LocalTraining(lr=0.3), Counting, upload=replace(joint, rules={"seen": everything}))
