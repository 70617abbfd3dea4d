"""Which tensors of a model travel: frozen tensors do not, and tied tensors travel once."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

from fedq.config import build_encoder, build_run
from fedq.data import Client, Examples
from fedq.data.holdout import drawn
from fedq.encoding import Encoder, FixedWidth, Key, StateDictEncoder, UniformQuantization
from fedq.errors import FedqError
from fedq.learning import ErrorFeedback, FedAvg, FederatedDropout, FedNova, LocalTraining, Scaffold
from fedq.learning.guard import NormGuard
from fedq.learning.parts import checksum
from fedq.simulation import checkpoint
from fedq.simulation.client_state_files import ClientStateFiles
from fedq.simulation.loop import rounds
from fedq.simulation.saving import continued
from fedq.simulation.workers import Workers
from fedq.train import CONF

UINT8 = StateDictEncoder(Encoder([UniformQuantization(bits=8)], FixedWidth()), threshold=0)
DROP = Encoder([UniformQuantization(bits=2)], FixedWidth())


class Adapter(nn.Module):
    """A frozen base of 99,000 parameters, and 1,000 that train."""

    def __init__(self, frozen=True):
        super().__init__()
        self.base, self.head = nn.Linear(100, 990, bias=False), nn.Linear(990, 1, bias=False)
        self.out = nn.Linear(1, 10, bias=False)
        self.register_buffer("scale", torch.tensor(1.0))
        self.base.requires_grad_(not frozen)
        self.units = {"hidden": (("base.weight", 0), ("head.weight", 1))}

    def forward(self, x):
        return self.out(self.head(self.base(x * self.scale)))


def make(number, features=100, examples=40):
    draw = torch.Generator().manual_seed(number)
    x, y = torch.randn(examples, features, generator=draw), torch.randint(10, (examples,), generator=draw)
    return Client(number, lambda: Examples(x, y))


CLIENTS = [make(0), make(1), make(2)]


def test_a_model_that_is_99_percent_frozen_sends_one_percent_of_the_bytes(process):
    bits = {}
    for frozen in (True, False):
        averaging = process(model=partial(Adapter, frozen), broadcast=UINT8, upload=UINT8)
        _, metrics = averaging.next(averaging.initialize(), CLIENTS[:1])
        bits[frozen] = metrics["broadcast_bits"], metrics["aggregated_bits"]
    trains = 990 + 10
    for few, all_bits in zip(bits[True], bits[False], strict=True):
        assert few / 8 < trains + 100
        assert few < all_bits / 90


CHANGES = {
    "plain": {},
    "feedback": {"broadcast": ErrorFeedback(UINT8), "upload": ErrorFeedback(UINT8)},
    "initial": {"broadcast": replace(UINT8, reference="initial")},
    "last": {"broadcast": replace(UINT8, reference="last")},
    "parts": {"submodel": FederatedDropout(0.5)},
    "joint": {"broadcast": replace(UINT8, joint=True), "upload": replace(UINT8, joint=True)},
    "scaffold": {"algorithm": Scaffold()},
    "fednova": {"algorithm": FedNova()},
    "guard": {"guard": NormGuard("clip")},
    "decay": {"server": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_frozen_tensors_keep_their_bits(process, tmp_path, changes):
    """The same holds for a run that is saved after two rounds and resumed."""
    averaging = process(model=Adapter, **{"broadcast": UINT8, "upload": UINT8, **changes})
    start = state = averaging.initialize()
    for number in range(5):
        if number == 2:
            path = checkpoint.save(averaging.protocol.without_base(state), {}, tmp_path, 1)
            saved, _ = checkpoint.load(path)
            assert "base.weight" not in saved.weights
            state = continued(averaging, saved, tmp_path)
        state, metrics = averaging.next(state, CLIENTS)
        assert metrics["clients"] == 3
    assert torch.equal(state.weights["base.weight"], start.weights["base.weight"])
    assert not torch.equal(state.weights["head.weight"], start.weights["head.weight"])
    assert list(state.weights) == list(Adapter().state_dict())


def test_structured_updates_of_a_frozen_model(process):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        upload = build_encoder(compose("config", ["encoder=structured_mask", "encoder.threshold=100"]), "upload")
    averaging = process(model=Adapter, upload=upload, client=LocalTraining(lr=0.1, structured=True))
    start = averaging.initialize()
    state, _ = averaging.next(start, CLIENTS)
    assert torch.equal(state.weights["base.weight"], start.weights["base.weight"])
    assert not torch.equal(state.weights["head.weight"], start.weights["head.weight"])


def test_a_frozen_base_trains_as_in_a_bare_loop(process):
    averaging = process(model=Adapter, client=LocalTraining(lr=0.1, batch_size=40))
    state = averaging.initialize()
    model = Adapter()
    model.load_state_dict(state.weights)
    for _ in range(3):
        state, _ = averaging.next(state, CLIENTS[:1])
    loop(model, CLIENTS[0].load(), 3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state.weights[name], value)


def loop(model, examples, steps):
    """Takes plain steps of rate 0.1 on all examples."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(examples.x), examples.y))
        optimizer.step()


def test_patterns_freeze_parameters_and_buffers(process):
    averaging = process(model=partial(Adapter, False), algorithm=FedAvg(frozen=["base.*", "sca?e"]))
    assert averaging.protocol.parts.travels == ["head.weight", "out.weight"]
    state, _ = averaging.next(averaging.initialize(), CLIENTS)
    assert torch.equal(state.weights["base.weight"], averaging.protocol.initial["base.weight"])


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (["base.*", "bass.*"], r"algorithm.frozen: no tensor fits 'bass.\*'. The tensors are scale, base.weight, head"),
        (["*"], "no parameter to train"),
    ],
)
def test_patterns_that_fit_nothing_or_everything(process, patterns, sentence):
    with pytest.raises(FedqError, match=sentence):
        process(model=Adapter, algorithm=FedAvg(frozen=patterns))


class Writes(Adapter):
    """A model that writes to its frozen tensors in training: to a buffer, and to a parameter's data."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        if self.training:
            self.get_parameter(self.name).data += 1 if "." in self.name else 0
            self.scale += "." not in self.name
        return super().forward(x)

    def get_parameter(self, name):
        return self.scale if name == "scale" else super().get_parameter(name)


@pytest.mark.parametrize("name", ["scale", "base.weight"])
def test_a_write_to_a_frozen_tensor_is_an_error(process, name):
    averaging = process(model=partial(Writes, name), algorithm=FedAvg(frozen=["scale"]))
    with pytest.raises(FedqError, match=f"training changes {name!r}, which is frozen"):
        averaging.next(averaging.initialize(), CLIENTS)


class Grows(Adapter):
    """A model whose extra state changes in training: two elements change in length, integers in dtype."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state.clone()

    def forward(self, x):
        if self.training:
            self.state = torch.cat([self.state, self.state]) if len(self.state) > 1 else self.state + 0.5
        return super().forward(x)


@pytest.mark.parametrize("state", [torch.zeros(2), torch.zeros(1, dtype=torch.int64)])
def test_a_change_of_shape_or_dtype_is_an_error(process, state):
    averaging = process(model=partial(Grows, state))
    with pytest.raises(FedqError, match="training changes the shape or dtype of '_extra_state'"):
        averaging.next(averaging.initialize(), CLIENTS)


def test_an_extra_state_that_is_a_tensor_is_averaged(process):
    averaging = process(model=partial(Grows, torch.zeros(1)))
    state, _ = averaging.next(averaging.initialize(), CLIENTS)  # each client takes two steps
    assert state.weights["_extra_state"].tolist() == [1.0]
    assert averaging.evaluate(state, CLIENTS[0].load())["loss"] > 0


class Masked(Adapter):
    """A model with constant buffers that have no mean, or are not finite."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("nothing", torch.tensor(float("nan")))
        self.register_buffer("turns", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("small", torch.ones(2, 2).to(torch.float8_e4m3fn))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))


def test_constant_buffers_of_any_values_and_dtypes(process):
    names = ["mask", "nothing", "turns", "small", "flags", "empty"]
    averaging, other = (process(model=Masked, algorithm=FedAvg(frozen=names), seed=seed) for seed in (1, 2))
    assert averaging.protocol.parts.frozen == ["mask", "nothing", "turns", "small", "flags", "empty", "base.weight"]
    state, metrics = averaging.next(averaging.initialize(), CLIENTS)
    assert metrics["clients"] == 3
    averaging.evaluate(state, CLIENTS[0].load())
    broadcast, _ = averaging.downlink.open(state, [0])
    other.protocol.seed = 1  # both sides have the same seed, but drew other weights
    other.protocol.receive(averaging.downlink.with_base(broadcast, broadcast.messages))
    for name in averaging.protocol.parts.frozen:
        ours, theirs = averaging.protocol.initial[name], other.protocol.initial[name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.numpy(force=True).tobytes() == theirs.numpy(force=True).tobytes() if ours.itemsize > 1 else True


def test_a_checkpoint_with_another_base_is_refused(process, tmp_path):
    averaging = process(model=Adapter)
    state, _ = averaging.next(averaging.initialize(), CLIENTS)
    # earlier versions saved the frozen tensors, too
    for saved in (state, averaging.protocol.without_base(state)):
        loaded, _ = checkpoint.load(checkpoint.save(saved, {}, tmp_path, 1))
        resumed = continued(averaging, loaded, tmp_path)
        assert all(torch.equal(resumed.weights[name], value) for name, value in state.weights.items())
        with pytest.raises(FedqError, match="of another model: the frozen tensors differ"):
            continued(process(model=Adapter, seed=1), loaded, tmp_path)


def test_copies_share_the_frozen_parameters(process):
    averaging = process(model=Adapter)
    state = averaging.initialize()
    base = averaging.protocol.model.base.weight
    for weight in (
        state.weights["base.weight"],
        averaging._model(state).base.weight,
        averaging.half._worker_model().base.weight,
    ):
        assert weight.data_ptr() == base.data_ptr()
    assert averaging.half._worker_model().head.weight.data_ptr() != averaging.protocol.model.head.weight.data_ptr()


class Tied(nn.Module):
    """Like a language model: the first and the last layer share weights, and one block is used twice."""

    def __init__(self):
        super().__init__()
        self.letters = nn.Embedding(26, 12)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))
        self.again = self.block
        self.out = nn.Linear(12, 26)
        self.out.weight = self.letters.weight

    def forward(self, x):
        return self.out(self.again(torch.relu(self.block(self.letters(x).mean(1)))))


class Filters(nn.Module):
    """Two convolutions with one kernel, whose channels are last in memory in training."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Linear(75, 10)

    def forward(self, x):
        return self.out(self.second(torch.relu(self.first(x))).flatten(1))


LETTERS = Examples(torch.randint(26, (40, 5), generator=torch.Generator().manual_seed(0)), torch.arange(40) % 26)
PICTURES = Examples(torch.rand(40, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10)
TIES = {
    Tied: {"out.weight": "letters.weight", "again.0.weight": "block.0.weight", "again.1.bias": "block.1.bias"},
    Filters: {"second.weight": "first.weight"},
}


@pytest.mark.parametrize(("model", "examples"), [(Tied, LETTERS), (Filters, PICTURES)])
def test_tied_tensors_travel_once_and_train_as_in_a_bare_loop(process, tmp_path, model, examples):
    averaging = process(model=model, client=LocalTraining(lr=0.1, batch_size=40))
    state = averaging.initialize()
    bare = model()
    bare.load_state_dict(state.weights)
    for _ in range(4):
        state, metrics = averaging.next(state, [Client(0, lambda: examples)])
    size = sum(p.numel() * p.itemsize for p in (*bare.parameters(), *bare.buffers()))  # ties count once here
    assert metrics["broadcast_bits"] == metrics["aggregated_bits"] == 8 * (size + 48)
    state, _ = checkpoint.load(checkpoint.save(state, {}, tmp_path, 1))
    state = continued(averaging, state, tmp_path)
    loop(bare, examples, 4)
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(state.weights[name], value, rtol=1e-5, atol=1e-6)
    for name, first in TIES[model].items():
        assert state.weights[name].data_ptr() == state.weights[first].data_ptr()
    expected = float(F.cross_entropy(bare.eval()(examples.x), examples.y).detach())
    assert averaging.evaluate(state, examples)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["feedback", "initial", "last", "joint", "scaffold", "fednova", "guard", "decay"])
def test_tied_tensors_stay_tied(process, name):
    averaging = process(model=Tied, **{"broadcast": UINT8, "upload": UINT8, **CHANGES[name]})
    start = state = averaging.initialize()
    for _ in range(3):
        state, metrics = averaging.next(state, [Client(0, lambda: LETTERS), Client(1, lambda: LETTERS)])
        assert metrics["clients"] == 2
    assert list(state.weights) == list(Tied().state_dict())
    assert not torch.equal(state.weights["letters.weight"], start.weights["letters.weight"])
    for name, first in TIES[Tied].items():
        assert torch.equal(state.weights[name], state.weights[first])


def test_a_pattern_may_name_any_of_the_tied(process):
    averaging = process(model=Tied, algorithm=FedAvg(frozen=["out.weight", "again.1.num*"]))
    assert averaging.protocol.parts.frozen == ["letters.weight", "block.1.num_batches_tracked"]


def test_tied_weights_have_no_parts(process):
    with pytest.raises(
        FedqError, match="'block.0.weight' and 'again.0.weight' are tied, and a sub-model would untie them"
    ):
        process(model=Tied, submodel=FederatedDropout(0.5))


def two_buffers(model):
    model.register_buffer("one", torch.zeros(3))
    model.register_buffer("other", model.one)


def halves_of_a_parameter(model):
    model.tail = nn.Parameter(model.first.weight.detach()[1:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (two_buffers, "'one' and 'other' are one tensor: only a Parameter may have two names"),
        (halves_of_a_parameter, "'tail' and 'first.weight' share memory: clone"),
    ],
)
def test_other_tensors_that_share_memory_are_refused(process, change, sentence):
    def changed():
        model = Filters()
        change(model)
        return model

    with pytest.raises(FedqError, match=sentence):
        process(model=changed)


class Normed(nn.Module):
    """A model with a batch norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(20, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)
        self.units = {"first": (("first.weight", 0),)}

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


OWN = [make(number, 20, 30 + 10 * number) for number in range(3)]
FEDBN, FEDPER = FedAvg(personal=["norm.*"]), FedAvg(personal=["last.*"])
FULL = LocalTraining(lr=0.1, batch_size=100)
NORM = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def kept(averaging, state, number):
    return averaging.store.load(number, state.attempt, averaging.protocol.kept_schema)


@pytest.mark.parametrize(
    "changes", [{"algorithm": FEDBN}, {"algorithm": FEDPER}, {"algorithm": Scaffold(personal=["norm.*"])}]
)
def test_one_client_with_personal_tensors_trains_as_a_bare_loop(process, changes):
    averaging = process(model=Normed, client=FULL, **changes)
    state = averaging.initialize()
    bare = Normed()
    bare.load_state_dict(state.weights)
    for _ in range(4):
        state, metrics = averaging.next(state, OWN[:1])
    loop(bare, OWN[0].load(), 4)
    whole = averaging.protocol.start(state.weights, kept(averaging, state, 0), Key(0))
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)
    sizes = sum(
        value.numel() * value.itemsize for name, value in whole.items() if name in averaging.protocol.parts.travels
    )
    assert metrics["broadcast_bits"] >= 8 * (sizes + 48)
    expected = float(F.cross_entropy(bare.eval()(OWN[1].load().x), OWN[1].load().y).detach())
    found = averaging.evaluate(state, OWN[1].load(), clients=[(0, OWN[1].load())])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("algorithm", "names"), [(FEDBN, NORM), (FEDPER, ["last.weight", "last.bias"])])
def test_personal_tensors_against_a_reference(process, algorithm, names):
    """Each model keeps its personal tensors, and takes the weighted mean of the others. Client 2 joins late."""
    averaging = process(model=Normed, client=FULL, algorithm=algorithm)
    assert averaging.protocol.parts.personal == names
    state = averaging.initialize()
    models = [Normed() for _ in OWN]
    for model in models:
        model.load_state_dict(state.weights)
    for cohort in ([0, 1], [1, 2, 0], [0, 2]):
        state, _ = averaging.next(state, [OWN[number] for number in cohort])
        for number in cohort:
            loop(models[number].train(), OWN[number].load(), 1)
        total = sum(len(OWN[number].load().y) for number in cohort)
        for name in set(models[0].state_dict()) - set(names):
            parts = [models[number].state_dict()[name] * (len(OWN[number].load().y) / total) for number in cohort]
            mean = sum(parts) if parts[0].is_floating_point() and name != NORM[-1] else torch.round(sum(parts)).long()
            for model in models:
                model.state_dict()[name].copy_(mean)
    for number, model in enumerate(models):
        whole = averaging.protocol.start(state.weights, kept(averaging, state, number), Key(0))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)
    test, own_test = make(9, 20).load(), make(8, 20).load()
    empty = Examples(test.x[:0], test.y[:0])
    clients = [(0, test), (1, own_test), (2, test), (2, empty)]
    metrics = averaging.evaluate(state, test, clients=iter(clients))
    losses, accuracies = [], []
    for model, examples in zip(models, (test, own_test, test), strict=True):
        outputs = model.eval()(examples.x).detach()
        losses.append(float(F.cross_entropy(outputs, examples.y)))
        accuracies.append(float((outputs.argmax(1) == examples.y).double().mean()))
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(sum(accuracies) / 3)
    theirs = averaging.evaluate_clients(state, [replace(OWN[number], test=lambda: test) for number in (0, 2)])
    assert theirs["accuracy_mean"] == pytest.approx((accuracies[0] + accuracies[2]) / 2)
    assert torch.equal(state.weights[names[0]], averaging.protocol.initial[names[0]])  # the first weights


@pytest.mark.parametrize("name", ["feedback", "initial", "last", "joint", "scaffold", "fednova", "guard", "decay"])
def test_personal_tensors_with_other_options(process, tmp_path, name):
    """The result is the same with several workers, with a store in files, and after a resume."""
    changes = {"broadcast": UINT8, "upload": UINT8, **CHANGES[name]}
    changes["algorithm"] = replace(changes.get("algorithm", FedAvg()), personal=["norm.*"])
    results = []
    for count in (1, 3):
        with Workers(count) as workers:
            folder = tmp_path / str(count)
            store = ClientStateFiles(folder, 0, memory=0)
            store.resume(0)
            averaging = process(model=Normed, map=workers.map, store=store, **changes)
            state = averaging.initialize()
            for number in range(4):
                if number == 2 and count == 3:
                    store.flush()
                    state, _ = checkpoint.load(checkpoint.save(state, {}, tmp_path, 1))
                    store = ClientStateFiles(folder, 0, memory=2**20)
                    store.resume(state.attempt, folder)
                    averaging = process(model=Normed, map=workers.map, store=store, **changes)
                state, metrics = averaging.next(state, OWN[:2])
                assert metrics["clients"] == 2
            found = averaging.evaluate(state, OWN[2].load(), clients=[(number, OWN[2].load()) for number in range(3)])
            results.append((state.weights, [kept(averaging, state, number) for number in (0, 1)], found))
    (weights, stores, found), (its_weights, its_stores, its_found) = results
    assert found == its_found
    for ours, theirs in zip((weights, *stores), (its_weights, *its_stores), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not torch.equal(stores[0]["norm.running_mean"], stores[1]["norm.running_mean"])
    assert set(NORM) <= set(stores[0])


def test_structured_updates_with_personal_tensors(process):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        upload = build_encoder(compose("config", ["encoder=structured_mask", "encoder.threshold=100"]), "upload")
    averaging = process(model=Normed, upload=upload, client=replace(FULL, structured=True), algorithm=FEDPER)
    state, _ = averaging.next(averaging.initialize(), OWN)
    assert not torch.equal(kept(averaging, state, 0)["last.weight"], state.weights["last.weight"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"algorithm": FedAvg(personal=["bn*"])},
            r"algorithm.personal: no tensor fits 'bn\*'. The tensors are first.w",
        ),
        ({"algorithm": FedAvg(personal=["*"])}, "algorithm.personal: all parameters that train fit a pattern"),
        (
            {"algorithm": FEDBN, "submodel": FederatedDropout(0.5)},
            "run.submodel: algorithm.personal needs clients that",
        ),
    ],
)
def test_personal_patterns_that_make_no_sense(process, changes, sentence):
    with pytest.raises(FedqError, match=sentence):
        process(model=Normed, **changes)


def test_personal_tensors_that_overflow_are_not_kept(process, caplog):
    class Overflows(Normed):
        def forward(self, x):
            outputs = super().forward(x)
            self.norm.running_var.data.fill_(float("inf"))
            return outputs

    averaging = process(model=Overflows, algorithm=FEDBN)
    with pytest.raises(FedqError, match="0 of 1 clients sent a usable .*'norm.running_var' holds NaN or infinity"):
        averaging.next(averaging.initialize(), OWN[:1])


def test_an_optimizer_that_clients_keep_covers_their_personal_tensors(process):
    training = replace(FULL, momentum=0.9, keep_optimizer=True)
    averaging = process(model=Normed, client=training, algorithm=FEDPER)
    state = averaging.initialize()
    bare = Normed()
    bare.load_state_dict(state.weights)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    examples = OWN[0].load()
    for _ in range(4):
        state, _ = averaging.next(state, OWN[:1])
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(bare(examples.x), examples.y))
        optimizer.step()
    whole = averaging.protocol.start(state.weights, kept(averaging, state, 0), Key(0))
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)


class Three:
    """A dataset of three clients, of which the second one has test examples."""

    num_classes, num_clients = 10, 3

    def client(self, number):
        return replace(OWN[number], test=make(8, 20).load if number == 1 else None)

    def test(self):
        return make(9, 20).load()


@pytest.mark.parametrize("evaluated", [None, 2])
def test_a_run_evaluates_clients_with_their_own_tensors(process, evaluated):
    averaging = process(model=Normed, client=FULL, algorithm=FEDBN)
    options = ["run.rounds=2", "run.clients_per_round=2", "run.seed=0", f"run.evaluate_clients={evaluated or 'null'}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = build_run(compose("config", options))
    *_, (state, metrics) = rounds(averaging, averaging.initialize(), Three(), run)
    numbers = drawn(0, "evaluated clients", 3, evaluated or 3)
    tests = [(number, make(8 if number == 1 else 9, 20).load()) for number in numbers]
    found = [averaging.evaluate(state, Three().test(), clients=[one]) for one in tests]
    assert len({one["loss"] for one in found}) == (evaluated or 3)
    assert metrics["test/loss"] == pytest.approx(sum(one["loss"] for one in found) / len(found))


def test_a_frozen_parameter_may_be_a_part_of_a_tensor():
    """torch does not view bytes that begin at an odd place as longer numbers."""
    both = torch.arange(18.0)
    assert checksum(both[1:]) == checksum(both[1:].clone()) != checksum(both[:-1])
