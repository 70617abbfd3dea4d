"""Optimizers of clients, clipping, steps, and learning rates over rounds, compared with loops of plain torch."""

import math
import random
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from fedq.errors import FedqError
from fedq.keys import Key
from fedq.learning import FederatedDropout, FedNova, LocalTraining, Scaffold, TrainingMetrics
from fedq.learning.optimizers import PREFIX, Rates, Scheduled

OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
    "Adam": torch.optim.Adam,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
    "Nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
}
KEY = Key(1, 2, 3).fold("train")


def by_hand(model, examples, build, epochs=1, limit=None, batch=20, key=KEY, clip=None):
    """Trains a model with plain torch; `limit` is the number of steps."""
    optimizer, steps, epoch = build(model.parameters()), 0, 0
    while steps < (limit or epochs * -(-len(examples.y) // batch)):
        order = torch.from_numpy(key.fold("shuffle").fold(str(epoch)).permutation(len(examples.y)))
        epoch += 1
        for part in order.split(batch):
            if steps == limit:
                break
            optimizer.zero_grad()
            F.cross_entropy(model(examples.x[part]), examples.y[part]).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            steps += 1
    return optimizer


def two(tiny):
    """Returns two models with equal weights, and the weights."""
    torch.manual_seed(0)
    model = tiny()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    other = tiny()
    other.load_state_dict(weights)
    return model, other, weights


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_takes_the_steps_of_plain_torch_to_the_last_bit(tiny, client, build):
    model, other, weights = two(tiny)
    examples = client(3, 50).load()
    LocalTraining(lr=0.01, optimizer=build, epochs=2).train(model, weights, examples, KEY)
    by_hand(other, examples, partial(build, lr=0.01), epochs=2)
    assert_same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"optimizer": torch.optim.Adam}], ids=str)
def test_clipping_is_torchs_to_the_last_bit(tiny, client, settings):
    model, other, weights = two(tiny)
    examples = client(3, 50).load()
    LocalTraining(lr=0.01, max_grad_norm=0.3, **settings).train(model, weights, examples, KEY)
    build = settings.get("optimizer", partial(torch.optim.SGD, momentum=settings.get("momentum", 0)))
    by_hand(other, examples, partial(build, lr=0.01), clip=0.3)
    assert_same(model.state_dict(), other.state_dict())


def test_a_clipped_step_has_the_norm_and_a_smaller_one_is_left(tiny, client):
    norms = {}
    for limit in (None, 0.25, 1e6):
        model, _, weights = two(tiny)
        LocalTraining(lr=1.0, batch_size=50, max_grad_norm=limit).train(model, weights, client(3, 50).load(), KEY)
        steps = [value - weights[name] for name, value in model.state_dict().items()]
        norms[limit] = float(torch.cat([step.flatten() for step in steps]).double().norm())
    assert norms[None] == norms[1e6] > 0.3
    assert abs(norms[0.25] - 0.25) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_a_round_has_exactly_so_many_steps_through_reshuffled_epochs(tiny, client, steps):
    model, other, weights = two(tiny)
    examples, training = client(3, 50).load(), LocalTraining(lr=0.01, steps=steps)
    metrics = training.train(model, weights, examples, KEY)
    by_hand(other, examples, partial(torch.optim.SGD, lr=0.01), limit=steps)
    assert_same(model.state_dict(), other.state_dict())
    # batches of 20, 20 and 10 examples in each epoch
    assert (metrics.steps, metrics.seen) == (steps, {1: 20, 2: 40, 3: 50, 4: 70, 7: 120}[steps])
    assert training.can_give(metrics, 50)


def test_a_server_believes_no_other_number_of_steps():
    def believed(training, examples, seen, steps):
        return training.can_give(TrainingMetrics({}, seen, steps), examples)

    four = LocalTraining(lr=0.1, steps=4)
    assert believed(four, 50, 70, 4)
    assert not believed(four, 50, 80, 4) and not believed(four, 50, 100, 6) and not believed(four, 51, 70, 4)
    assert believed(four, 1, 4, 4) and not believed(four, 0, 0, 4) and not believed(four, 0, 0, 0)
    some = LocalTraining(lr=0.1, steps=4, max_examples=30)
    assert believed(some, 50, 60, 4)
    assert believed(LocalTraining(lr=0.1, epochs=2), 50, 100, 6)
    assert not believed(LocalTraining(lr=0.1, epochs=2), 50, 70, 4)


# learning rates


SCHEDULES = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=3, gamma=0.5),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=10),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=20),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda round_: 1 / (1 + round_)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_rate_of_a_round_is_torchs_in_any_order(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2, momentum=0.9)
    scheduler, rates = schedule(optimizer), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    places = list(range(12))
    random.Random(0).shuffle(places)
    training, fresh = LocalTraining(lr=0.2, schedule=schedule), Rates(0.2, schedule, "client.schedule")
    assert [training.at(round_).lr for round_ in places] == [rates[round_] for round_ in places]
    assert fresh(11) == rates[11]
    assert len({*rates}) > 3


def test_the_clients_rate_follows_its_schedule(process, client):
    """One step of a full batch: the update is rate · gradient."""
    schedule = SCHEDULES["StepLR"]
    run = process(client=LocalTraining(lr=0.4, batch_size=100, schedule=schedule))
    state = run.initialize()
    for round_ in range(8):
        expected = LocalTraining(lr=0.4 * 0.5 ** (round_ // 3), batch_size=100)
        alone = process(client=expected)
        again, _ = alone.next(state, [client(1)])
        # a run that resumes knows the rate of its round
        state, _ = process(client=LocalTraining(lr=0.4, batch_size=100, schedule=schedule)).next(state, [client(1)])
        assert_same(state.weights, again.weights)


@pytest.mark.parametrize("build", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam], ids=["SGD", "Adam"])
def test_the_servers_rate_follows_its_schedule(process, client, build):
    schedule = SCHEDULES["CosineAnnealingLR"]
    server = Scheduled(partial(build, lr=0.1), schedule)
    state = process(server=server).initialize()
    weights = {name: value.clone().requires_grad_() for name, value in state.weights.items()}
    optimizer = build(weights.values(), lr=0.1)
    scheduler = schedule(optimizer)
    for _ in range(5):
        plain, _ = process().next(replace(state, optimizer={}), [client(1)])  # a server rate of 1.0: the mean update
        for name, value in weights.items():
            value.grad = state.weights[name] - plain.weights[name]
        optimizer.step()
        scheduler.step()
        state, _ = process(server=server).next(state, [client(1)])
        for name, value in weights.items():
            torch.testing.assert_close(state.weights[name], value.detach(), atol=1e-6, rtol=1e-5)


# state that a client keeps


@pytest.mark.parametrize(
    "settings",
    [{"momentum": 0.9}, *({"optimizer": build} for build in OPTIMIZERS.values())],
    ids=["momentum", *OPTIMIZERS],
)
def test_a_kept_state_goes_on_in_the_clients_next_round(tiny, process, client, settings):
    training = LocalTraining(lr=0.01, keep_optimizer=True, **settings)
    run, examples = process(client=training), client(3, 50).load()
    other = tiny()
    build = settings.get("optimizer", partial(torch.optim.SGD, momentum=0.9))
    optimizer = build(other.parameters(), lr=0.01)
    state = run.initialize()
    for round_ in range(3):
        cohort = [client(3, 50)] if round_ != 1 else [client(2, 50)]  # in between, another client has another state
        other.load_state_dict(state.weights)
        before = state
        state, _ = run.next(state, cohort)
        if round_ == 1:
            continue
        by_hand(other, examples, lambda parameters: optimizer, key=Key(0, round_, 3).fold("train"))
        for name, value in other.state_dict().items():
            torch.testing.assert_close(state.weights[name], value, atol=1e-6, rtol=1e-5)
    kept = run.store.load(3, 3, run.protocol.kept_schema)
    assert all(name.startswith(PREFIX) for name in kept)
    fresh, _ = process(client=LocalTraining(lr=0.01, **settings)).next(before, cohort)
    assert not torch.equal(fresh.weights["big.weight"], state.weights["big.weight"])


def test_a_kept_state_is_not_changed_by_a_round_that_is_repeated(process, client):
    run = process(client=LocalTraining(lr=0.01, optimizer=torch.optim.Adam, keep_optimizer=True))
    first, _ = run.next(run.initialize(), [client(3, 50)])
    second, _ = run.next(first, [client(3, 50)])
    again, _ = run.next(first, [client(3, 50)])
    assert_same(second.weights, again.weights)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.unused = nn.Linear(28 * 28, 10), nn.Linear(2, 2)

    def forward(self, x):
        return self.out(x.flatten(1))


def test_a_parameter_without_gradient_has_no_state_to_keep(process, client):
    training = LocalTraining(lr=0.01, optimizer=torch.optim.Adam)
    run = process(model=Unused, client=training)
    state, _ = run.next(run.initialize(), [client(1)])
    assert torch.equal(state.weights["unused.weight"], run.protocol.initial["unused.weight"])
    run = process(model=Unused, client=LocalTraining(lr=0.01, optimizer=torch.optim.Adam, keep_optimizer=True))
    with pytest.raises(FedqError, match=r"keep_optimizer must be false: training has no gradient for .*unused.weight"):
        run.next(run.initialize(), [client(1)])


# options that do not fit


ADAM = {"optimizer": torch.optim.Adam}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 3, "epochs": 2}, "epochs or steps, not both"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"momentum": 0.5, **ADAM}, "momentum must be 0 with another optimizer"),
        ({"keep_optimizer": True}, "keep_optimizer must be false with plain SGD"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_do_not_fit_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LocalTraining(lr=0.1, **settings)


class Lists(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [1]


@pytest.mark.parametrize(
    ("settings", "parts", "sentence"),
    [
        ({"optimizer": torch.optim.LBFGS}, {}, "client.optimizer: TypeError: .* 'closure'"),
        (
            {"optimizer": torch.optim.SparseAdam},
            {},
            "client.optimizer: RuntimeError: SparseAdam does not support dense",
        ),
        ({"optimizer": partial(torch.optim.Adam, eps=-1)}, {}, "client.optimizer: Invalid epsilon value: -1"),
        ({"optimizer": torch.optim.SGD, "keep_optimizer": True}, {}, "keep_optimizer must be false: .* has no state"),
        ({"optimizer": Lists, "keep_optimizer": True}, {}, "keep_optimizer: 'history' .* is not a tensor"),
        ({"schedule": lr_scheduler.ReduceLROnPlateau}, {}, "client.schedule, round 2: TypeError: .* 'metrics'"),
        (ADAM, {"algorithm": Scaffold()}, "algorithm=scaffold needs .* client.optimizer=null"),
        (ADAM, {"algorithm": FedNova()}, "algorithm=fednova needs client.optimizer=null"),
        ({"momentum": 0.5, "keep_optimizer": True}, {"algorithm": FedNova()}, "algorithm=fednova needs"),
        ({"structured": True, **ADAM}, {}, "client.structured needs client.optimizer=null"),
        ({"keep_optimizer": True, **ADAM}, {"submodel": FederatedDropout(0.5)}, "run.submodel: client.keep_optimizer"),
    ],
    ids=range(11),
)
def test_what_cannot_be_combined_is_refused_in_a_sentence(process, settings, parts, sentence):
    with pytest.raises(FedqError, match=sentence):
        process(client=LocalTraining(lr=0.1, **settings), **parts)


def test_an_optimizer_with_another_state_may_forget_it(process, client):
    run = process(client=LocalTraining(lr=0.1, optimizer=Lists))
    _, metrics = run.next(run.initialize(), [client(1)])
    assert metrics["clients"] == 1


def test_scaffold_refuses_a_rate_of_0(process, client):
    schedule = partial(lr_scheduler.LambdaLR, lr_lambda=lambda round_: 0.0)
    run = process(client=LocalTraining(lr=0.1, schedule=schedule), algorithm=Scaffold())
    with pytest.raises(
        FedqError, match=r"client\.schedule gives the rate 0 in round 1, and algorithm=scaffold divides"
    ):
        run.next(run.initialize(), [client(1)])


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=2), "schedule, round 4: Tried to step 3 times"),
        (partial(lr_scheduler.LambdaLR, lr_lambda=lambda r: 1 / (2 - r)), "schedule, round 3: ZeroDivisionError: "),
        (
            partial(lr_scheduler.LambdaLR, lr_lambda=lambda r: 1 - r),
            "schedule gives the rate -0.1 in round 3:",
        ),
        (
            partial(lr_scheduler.StepLR, step_size=2, gamma=math.nan),
            "schedule gives the rate nan in round 3:",
        ),
    ],
)
@pytest.mark.parametrize("side", ["client", "server"])
def test_a_round_for_which_a_schedule_has_no_rate_is_named(process, client, schedule, error, side):
    parts = {"client": LocalTraining(lr=0.1, schedule=schedule)}
    if side == "server":
        parts = {"server": Scheduled(partial(torch.optim.SGD, lr=0.1), schedule)}
    run = process(**parts)
    state = run.initialize()
    with pytest.raises(FedqError, match=re.escape(f"{side}.{error}")):
        for _ in range(4):
            state, _ = run.next(state, [client(0)])


def test_an_optimizer_that_does_not_take_the_models_parameters_is_named_before_the_first_round(process):
    def only_matrices(parameters, lr):
        parameters = list(parameters)
        if any(parameter.dim() != 2 for parameter in parameters):
            raise ValueError("only 2-D parameters")
        return torch.optim.SGD(parameters, lr=lr)

    with pytest.raises(FedqError, match=r"client\.optimizer: only 2-D parameters"):
        process(client=LocalTraining(lr=0.1, optimizer=only_matrices))
