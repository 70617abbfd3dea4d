"""FedAdam, SCAFFOLD and FedProx on a character model with an LSTM, compared with hand-written loops in plain torch.

The references share no code with fedq, nn.LSTM or F.cross_entropy.
"""

from functools import partial

import pytest
import torch
from torch import nn

from fedq.data import Client, Examples
from fedq.learning import FedAvg, FederatedAveraging, LocalTraining, NextToken, Scaffold

VOCABULARY, WIDTH, HIDDEN, LENGTH, CLIENTS = 7, 3, 4, 6, 5
COHORTS = [[(round_ + 2 * i) % CLIENTS for i in range(3)] for round_ in range(6)]
RATE, STEPS = 0.5, 3


class CharLSTM(nn.Module):
    """Embedding, one LSTM layer, logits; in float64."""

    def __init__(self, num_classes: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, WIDTH, dtype=torch.float64)
        self.lstm = nn.LSTM(WIDTH, HIDDEN, batch_first=True, dtype=torch.float64)
        self.out = nn.Linear(HIDDEN, num_classes, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embedding(x))[0])


def text(client: int) -> Examples:
    """Returns a client's sequences; the last one ends in padding. Clients differ in the number of sequences and in the
    frequencies."""
    draw = torch.Generator().manual_seed(client)
    frequencies = torch.rand(VOCABULARY - 1, generator=draw)
    tokens = 1 + torch.multinomial(frequencies, (4 + client) * (LENGTH + 1), True, generator=draw)
    tokens = tokens.reshape(-1, LENGTH + 1)
    tokens[-1, 3:] = 0
    return Examples(tokens[:, :-1], tokens[:, 1:])


def loss_by_hand(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross entropy over the targets that are not padding, by the equations of Hochreiter 1997."""
    h = c = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for t in range(LENGTH):
        gates = weights["embedding.weight"][x[:, t]] @ weights["lstm.weight_ih_l0"].T + weights["lstm.bias_ih_l0"]
        gates = gates + h @ weights["lstm.weight_hh_l0"].T + weights["lstm.bias_hh_l0"]
        enter, forget, cell, leave = gates.chunk(4, 1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(cell)
        h = torch.sigmoid(leave) * torch.tanh(c)
        logits = h @ weights["out.weight"].T + weights["out.bias"]
        for i in range(len(x)):
            if y[i, t]:
                total = total + logits[i].exp().sum().log() - logits[i, y[i, t]]
                count += 1
    return total / count


def gradients(weights: dict[str, torch.Tensor], examples: Examples) -> dict[str, torch.Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    return dict(zip(leaves, torch.autograd.grad(loss_by_hand(leaves, *examples), leaves.values()), strict=True))


def mean(tensors: list[dict[str, torch.Tensor]], weights: list[int]) -> dict[str, torch.Tensor]:
    return {
        name: sum(weight * one[name] for one, weight in zip(tensors, weights, strict=True)) / sum(weights)
        for name in tensors[0]
    }


def run(training: LocalTraining, server, algorithm: FedAvg | None = None):
    """Returns the first weights, and the process and its state after the rounds."""
    process = FederatedAveraging(
        CharLSTM, training, server, algorithm=algorithm or FedAvg(), population=CLIENTS, task=NextToken(), seed=4
    )
    state = process.initialize()
    first = {name: value.clone() for name, value in state.weights.items()}
    for cohort in COHORTS:
        state, metrics = process.next(state, [Client(i, partial(text, i), len(text(i).y)) for i in cohort])
        assert metrics["clients"] == len(cohort)
    return first, state


def assert_close(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)


def test_fedadam() -> None:
    """Reddi 2021, algorithm 2, with the bias correction of Kingma 2015, section 3."""
    lr, beta1, beta2, eps = 0.05, 0.9, 0.99, 1e-3
    server = partial(torch.optim.Adam, lr=lr, betas=(beta1, beta2), eps=eps)
    x, state = run(LocalTraining(lr=RATE, epochs=STEPS, batch_size=100), server)
    m, v = ({name: torch.zeros_like(value) for name, value in x.items()} for _ in range(2))
    for round_, cohort in enumerate(COHORTS, 1):
        updates = []
        for client in cohort:
            y = dict(x)
            for _ in range(STEPS):
                g = gradients(y, text(client))
                y = {name: value - RATE * g[name] for name, value in y.items()}
            updates.append({name: value - x[name] for name, value in y.items()})
        delta = mean(updates, [len(text(client).y) for client in cohort])
        for name, value in delta.items():
            m[name] = beta1 * m[name] + (1 - beta1) * value
            v[name] = beta2 * v[name] + (1 - beta2) * value**2
            step = m[name] / (1 - beta1**round_) / ((v[name] / (1 - beta2**round_)).sqrt() + eps)
            x[name] = x[name] + lr * step
    assert_close(state.weights, x)


def test_scaffold() -> None:
    """Karimireddy 2020, algorithm 1, option II."""
    x, state = run(LocalTraining(lr=RATE, epochs=STEPS, batch_size=100), partial(torch.optim.SGD, lr=0.7), Scaffold())
    c = {name: torch.zeros_like(value) for name, value in x.items()}
    own = {client: dict(c) for client in range(CLIENTS)}
    for cohort in COHORTS:
        updates, changes = [], []
        for client in cohort:
            y = dict(x)
            for _ in range(STEPS):
                g = gradients(y, text(client))
                y = {name: value - RATE * (g[name] - own[client][name] + c[name]) for name, value in y.items()}
            after = {name: own[client][name] - c[name] + (x[name] - y[name]) / (STEPS * RATE) for name in x}
            changes.append({name: after[name] - own[client][name] for name in x})
            updates.append({name: y[name] - x[name] for name in x})
            own[client] = after
        delta, change = mean(updates, [1] * len(cohort)), mean(changes, [1] * len(cohort))
        x = {name: x[name] + 0.7 * delta[name] for name in x}
        c = {name: c[name] + len(cohort) / CLIENTS * change[name] for name in x}
    assert_close(state.weights, x)
    assert_close({name.removeprefix("*control/"): value for name, value in state.groups.items()}, c)
    assert min(float(value.abs().max()) for one in own.values() for value in one.values()) > 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_fedprox(momentum: float) -> None:
    """Li 2020, algorithm 2: each step follows the gradient of F_k(w) + μ/2 · ‖w − wᵗ‖²."""
    mu = 0.6
    training = LocalTraining(lr=RATE, epochs=STEPS, batch_size=100, proximal=mu, momentum=momentum)
    x, state = run(training, partial(torch.optim.SGD, lr=1.0))
    for cohort in COHORTS:
        trained = []
        for client in cohort:
            y, v = dict(x), {name: torch.zeros_like(value) for name, value in x.items()}
            for _ in range(STEPS):
                g = gradients(y, text(client))
                v = {name: momentum * v[name] + g[name] + mu * (y[name] - x[name]) for name in x}
                y = {name: y[name] - RATE * v[name] for name in x}
            trained.append(y)
        x = mean(trained, [len(text(client).y) for client in cohort])
    assert_close(state.weights, x)
