"""How adapters are averaged: FFA-LoRA, FlexLoRA and RoLoRA against numpy, in float64 and without their code."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedq.data import Client, Examples
from fedq.encoding import Encoder, FixedWidth, MessageError, StateDictEncoder, UniformQuantization
from fedq.errors import FedqError
from fedq.learning import ErrorFeedback, FedAvg, FederatedAveraging, FlexLoRA, LocalTraining, RoLoRA
from fedq.learning.guard import NormGuard

FEATURES, CLASSES, RANK = 7, 5, 2
A, B, HEAD = "layer.lora_A.default.weight", "layer.lora_B.default.weight", "head.bias"
FEDAVG = FedAvg()
UINT8 = StateDictEncoder(Encoder([UniformQuantization(8)], FixedWidth()), threshold=0)


class Adapted(nn.Module):
    """A frozen layer with an adapter whose names are peft's, and a bias that trains."""

    def __init__(self, rank=RANK, partner=True):
        super().__init__()
        self.base = nn.Linear(FEATURES, CLASSES, bias=False).requires_grad_(False)
        self.head = nn.Module()
        self.head.bias = nn.Parameter(torch.zeros(CLASSES))
        self.layer = nn.Module()
        self.layer.lora_A = nn.ModuleDict({"default": nn.Linear(FEATURES, rank, bias=False)})
        self.layer.lora_B = nn.ModuleDict({"default": nn.Linear(rank, CLASSES, bias=False)})
        self.layer.lora_A.requires_grad_(partner)
        nn.init.normal_(self.layer.lora_B["default"].weight)

    def forward(self, x):
        return self.base(x) + self.layer.lora_B["default"](self.layer.lora_A["default"](x)) + self.head.bias


def make(number: int) -> Client:
    draw = torch.Generator().manual_seed(number)
    n = 6 + 5 * number
    x, y = torch.randn(n, FEATURES, generator=draw), torch.randint(CLASSES, (n,), generator=draw)
    return Client(number, lambda: Examples(x, y), n)


CLIENTS = [make(number) for number in range(3)]
WEIGHTS = np.array([6, 11, 16]) / 33


def process(algorithm=FEDAVG, model=Adapted, **changes) -> FederatedAveraging:
    server = partial(torch.optim.SGD, lr=1.0)
    parts = {"client": LocalTraining(lr=0.3, epochs=4, batch_size=5), "server": server, **changes}
    return FederatedAveraging(model, algorithm=algorithm, **parts)


def after(algorithm=FEDAVG, clients=CLIENTS, rounds=1, **changes):
    """Returns the last state and metrics."""
    averaging = process(algorithm, **changes)
    state = averaging.initialize()
    for _ in range(rounds):
        state, metrics = averaging.next(state, clients)
    return state, metrics


def alone(name, **changes) -> list[np.ndarray]:
    """Returns one tensor of each client, from training with this client alone."""
    return [after(clients=[client], **changes)[0].weights[name].double().numpy() for client in CLIENTS]


def product(state) -> np.ndarray:
    return state.weights[B].double().numpy() @ state.weights[A].double().numpy()


def mean_product(**changes) -> np.ndarray:
    return sum(w * b @ a for w, a, b in zip(WEIGHTS, alone(A, **changes), alone(B, **changes), strict=True))


def test_flex_lora_is_the_best_approximation_of_the_mean_product():
    state, metrics = after(FlexLoRA())
    mean = mean_product()
    left, values, right = np.linalg.svd(mean)
    best = left[:, :RANK] * values[:RANK] @ right[:RANK]
    np.testing.assert_allclose(product(state), best, atol=1e-6)
    np.testing.assert_allclose(state.weights[A] @ state.weights[A].T, np.eye(RANK), atol=1e-6)
    np.testing.assert_allclose(state.weights[HEAD], WEIGHTS @ np.array(alone(HEAD)), atol=1e-6)
    plain, its_metrics = after()
    assert np.linalg.norm(product(state) - mean) < 0.9 * np.linalg.norm(product(plain) - mean)
    assert metrics["aggregated_bits"] == its_metrics["aggregated_bits"]


def test_flex_lora_of_full_rank_is_exact():
    """The rank is 6, above the five outputs: the mean product is exact, and one row of A stays."""
    model = partial(Adapted, 6)
    state, _ = after(FlexLoRA(), model=model)
    np.testing.assert_allclose(product(state), mean_product(model=model), atol=1e-6)
    start = process(model=model).initialize()
    assert torch.equal(state.weights[B][:, 5:], torch.zeros(CLASSES, 1))
    torch.testing.assert_close(state.weights[A][5:], start.weights[A][5:])


def test_flex_lora_clips_updates_before_the_product():
    guard = NormGuard("clip", initial=0.1)
    state, _ = after(FlexLoRA(), clients=CLIENTS[:1], guard=guard)
    clipped, _ = after(clients=CLIENTS[:1], guard=guard)
    np.testing.assert_allclose(product(state), product(clipped), atol=1e-6)


def test_products_that_overflow_are_refused():
    """A singular value decomposition of infinity would end the server."""
    averaging = process(FlexLoRA())
    start = averaging.initialize()
    huge = torch.full((CLASSES, FEATURES), torch.inf)
    with pytest.raises(MessageError, match=f"products of '{B}' overflows torch.float32"):
        averaging.protocol.algorithm.from_sum({B: huge, HEAD: torch.zeros(CLASSES)}, 1, start.weights)


def test_frozen_a_makes_the_mean_exact_at_half_the_bytes():
    frozen = FedAvg(frozen=["*.lora_A.*"])
    state, metrics = after(frozen)
    np.testing.assert_allclose(product(state), mean_product(algorithm=frozen), atol=1e-6)
    assert torch.equal(state.weights[A], process().initialize().weights[A])
    saved = after()[1]["aggregated_bits"] - metrics["aggregated_bits"]
    assert saved == after()[1]["broadcast_bits"] - metrics["broadcast_bits"] == 3 * 8 * 4 * RANK * FEATURES


@pytest.mark.parametrize("server", [partial(torch.optim.SGD, lr=1.0), partial(torch.optim.Adam, lr=0.01)])
@pytest.mark.parametrize("client", [{}, {"optimizer": partial(torch.optim.AdamW, weight_decay=0.5)}])
def test_ro_lora_trains_and_sends_one_matrix_at_a_time(server, client):
    training = LocalTraining(lr=0.05, epochs=2, **client)
    averaging = process(RoLoRA(), server=server, client=training)
    states, bits = [averaging.initialize()], []
    for _ in range(4):
        state, metrics = averaging.next(states[-1], CLIENTS)
        states.append(state)
        bits.append((metrics["broadcast_bits"], metrics["aggregated_bits"]))
    for place, (before, now) in enumerate(pairwise(states)):
        rests, moves = (A, B) if place % 2 == 0 else (B, A)
        assert torch.equal(before.weights[rests], now.weights[rests])
        assert not torch.equal(before.weights[moves], now.weights[moves])
        assert not torch.equal(before.weights[HEAD], now.weights[HEAD])
    every = CLASSES + RANK * (FEATURES + CLASSES)
    sent = [CLASSES + RANK * CLASSES, CLASSES + RANK * FEATURES] * 2
    assert bits == [(3 * 8 * (4 * every + 48), 3 * 8 * (4 * some + 48)) for some in sent]


def test_a_round_of_ro_lora_is_a_round_with_a_frozen():
    """The mean product is exact; the next round goes on from there with B at rest."""
    frozen = FedAvg(frozen=["*.lora_A.*"])
    np.testing.assert_allclose(product(after(RoLoRA())[0]), mean_product(algorithm=frozen), atol=1e-6)
    state, _ = after(RoLoRA(), broadcast=UINT8, upload=UINT8, rounds=4)
    assert (
        process().evaluate(state, CLIENTS[2].load())["loss"]
        < process().evaluate(process().initialize(), CLIENTS[2].load())["loss"]
    )


@pytest.mark.parametrize(
    ("algorithm", "changes", "sentence"),
    [
        (RoLoRA(), {"upload": ErrorFeedback(UINT8)}, "algorithm=rolora: encoder.upload.error_feedback must be false"),
        (RoLoRA(), {"client": LocalTraining(lr=0.1, momentum=0.9, keep_optimizer=True)}, "keep_optimizer must be"),
        (RoLoRA(), {"model": partial(Adapted, partner=False)}, "needs a model whose LoRA adapters send both A and B"),
        (RoLoRA(), {"model": partial(nn.Linear, FEATURES, CLASSES)}, "needs a model whose LoRA adapters"),
        (FlexLoRA(), {"model": partial(nn.Linear, FEATURES, CLASSES)}, "needs a model whose LoRA adapters"),
        (FlexLoRA(frozen=["*.lora_A.*"]), {}, "needs a model whose LoRA adapters send both A and B"),
    ],
)
def test_what_does_not_fit_is_one_sentence(algorithm, changes, sentence):
    with pytest.raises(FedqError, match=sentence):
        process(algorithm, **changes)
