"""Error feedback at the clients."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from fedq.data import Client, Examples
from fedq.encoding import (
    Codec,
    Encoder,
    EncodingStage,
    FixedWidth,
    HadamardRotation,
    Key,
    PowerSGD,
    RandomMask,
    ScaledSign,
    StateDictEncoder,
    TensorSpec,
    TopK,
    UniformQuantization,
    ZeroOutliers,
)
from fedq.encoding.message import repacked
from fedq.errors import FedqError
from fedq.learning import ClientFailure, ErrorFeedback, FederatedAveraging, LocalTraining, TooFewClients, error_feedback
from fedq.learning import client as client_half
from fedq.learning.client_state import InMemory
from fedq.learning.guard import NormGuard

SIGN, TOP_K = Encoder([ScaledSign()], FixedWidth()), Encoder([TopK(0.01)])
ENCODERS = {
    "sign": StateDictEncoder(SIGN),
    "top_k": StateDictEncoder(TOP_K),
    "joint": StateDictEncoder(TOP_K, 10, joint=True),
    "summed first": StateDictEncoder(Encoder([HadamardRotation(), ScaledSign()], FixedWidth())),
    "summed first, exact": StateDictEncoder(Encoder([HadamardRotation()])),
    "common scale": StateDictEncoder(TOP_K, 100, common_scale=True),
    "adaptive": StateDictEncoder(Encoder([PowerSGD(2)])),
    "by rule": StateDictEncoder(TOP_K, rules={"small.weight": SIGN}),
    "nothing": StateDictEncoder(),
}
CHAINS = {name: ErrorFeedback(encoder) for name, encoder in ENCODERS.items()}


class Seen(InMemory):
    """A store that records the saved states."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def commit(self, client, attempt, tensors):
        self.saved[client, attempt] = {name: value.clone() for name, value in tensors.items()}
        super().commit(client, attempt, tensors)


@pytest.fixture
def updates(monkeypatch):
    """Returns a list of the exact updates, in order."""
    made, update_of = [], client_half.update_of

    def recording(trained, received):
        update = update_of(trained, received)
        made.append({name: value.clone() for name, value in update.items()})
        return update

    monkeypatch.setattr(client_half, "update_of", recording)
    return made


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("chain", CHAINS)
def test_what_was_sent_and_the_last_residual_are_all_updates(process, client, updates, monkeypatch, chain):
    seen, decoded = Seen(), []
    averaging, rounds = process(upload=CHAINS[chain], store=seen), 6
    upload, decode = averaging.protocol.weights.upload, Codec.decode

    def recording(self, message, key, *args, stop_at_sum=False, **kwargs):
        if self is upload and key.client == 1:
            whole, _ = decode(self, message, key, *args, **kwargs)
            decoded.append({name: tensor.clone() for name, tensor in whole.items()})
        return decode(self, message, key, *args, stop_at_sum=stop_at_sum, **kwargs)

    monkeypatch.setattr(Codec, "decode", recording)
    state = averaging.initialize()
    for _ in range(rounds):
        state, _ = averaging.next(state, [client(1)])
    times = len(decoded) // rounds
    assert len(decoded) == rounds * times
    # the client decodes its own message and the server decodes the received message, with the same result
    assert times == (1 if chain == "nothing" else 2)
    assert all(map(same, decoded[::times], decoded[times - 1 :: times]))
    sent, kept = decoded[::times], seen.saved.get((1, rounds - 1), {})
    staged = {"joint": 3, "common scale": 2, "by rule": 2, "nothing": 0}.get(chain, 1)
    assert len(kept) == staged
    for name in updates[0]:
        total = sum(update[name].double() for update in updates)
        told = sum(message[name].double() for message in sent)
        if name in kept:
            assert kept[name].dtype == torch.float32
            told += kept[name].double()
            assert float(kept[name].norm()) > 0.1 * float(total.norm()) or "exact" in chain
        torch.testing.assert_close(told, total, rtol=0, atol=1e-6 * float(total.abs().max()))


def test_a_client_gets_its_own_and_of_its_last_round(process, client, updates):
    seen = Seen()
    averaging = process(upload=CHAINS["top_k"], store=seen)
    state = averaging.initialize()
    for cohort in ([1, 2], [2, 3], [1, 3]):
        state, _ = averaging.next(state, [client(number) for number in cohort])
    trained = dict(zip([(1, 0), (2, 0), (2, 1), (3, 1), (1, 2), (3, 2)], updates, strict=True))
    for (number, serial), before in {(1, 2): (1, 0), (2, 1): (2, 0), (3, 2): (3, 1)}.items():
        compensated = trained[number, serial]["big.weight"] + seen.saved[before]["big.weight"]
        left = seen.saved[number, serial]["big.weight"]
        sent = left != compensated
        assert int(sent.sum()) == round(0.01 * sent.numel())  # the largest elements are sent exact
        assert float(left[sent].abs().max()) == 0
        assert float(compensated[sent].abs().min()) >= float(left.abs().max())


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def opposed(number: int) -> Client:
    """Returns one of two clients. Eight small features agree in both; one large feature has opposite signs."""
    y = torch.arange(20) % 2
    signs = 2.0 * y[:, None] - 1
    loud = signs * (3.0 if number else -3.0)
    return Client(number, lambda: Examples(torch.cat((loud, signs * 0.3 * torch.ones(8)), 1), y))


@pytest.mark.parametrize("feedback", [False, True])
def test_a_strongly_biased_chain_learns_with_it_and_not_without(feedback):
    # top-k sends only the two weights of the large feature, and the updates of the clients to these two weights cancel
    upload = StateDictEncoder(Encoder([TopK(2 / 18)]), 0)
    averaging = FederatedAveraging(
        Linear,
        LocalTraining(lr=0.5, batch_size=20),
        partial(torch.optim.SGD, lr=1.0),
        upload=ErrorFeedback(upload) if feedback else upload,
    )
    state = averaging.initialize()
    for _ in range(60):
        state, _ = averaging.next(state, [opposed(0), opposed(1)])
    both = [opposed(number).load() for number in (0, 1)]
    x, y = torch.cat([part.x for part in both]), torch.cat([part.y for part in both])
    x[:, 0] = 0
    found = averaging.evaluate(state, Examples(x, y))
    if feedback:
        assert found["accuracy"] == 1
        assert found["loss"] < 0.2
    else:
        assert float(state.weights["layer.weight"][:, 1:].abs().max()) == 0
        assert found["loss"] > 0.69


class Wrong:
    """A network that harms each message of client 1 from round 1 on."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, message: bytes, key: Key) -> bytes:
        if key.client != 1 or key.round != 1:
            return message
        match self.how:
            case "crash":
                raise ClientFailure("silent", "it crashed")
            case "late":
                raise ClientFailure("late", "it came late")
            case "damaged":
                return message[:-3] + b"\0\0\0"
            case "cut":
                return message[:-30]
            case "replayed":
                return repacked(message, key._replace(round=0))
        return message


def gone() -> Examples:
    raise ClientFailure("silent", "it dropped out")


NAN = Examples(torch.full((5, 1, 28, 28), torch.nan), torch.zeros(5, dtype=torch.int64))
EMPTY = Examples(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("how", "keeps"),
    [
        *[(how, "the new") for how in ("nothing", "late", "damaged", "cut", "replayed", "outlier")],
        *[(how, "the old") for how in ("crash", "dropout", "empty", "nan", "undecodable")],
    ],
)
def test_what_a_client_that_fails_keeps(process, client, updates, monkeypatch, how, keeps):
    """The client fails in the second of three rounds.

    Its message in the third round shows the residual that it kept.
    """
    second = {"dropout": gone, "empty": lambda: EMPTY, "nan": lambda: NAN}.get(how)
    guard = NormGuard("drop", initial=1e-6) if how == "outlier" else None
    seen = Seen()
    averaging = process(upload=CHAINS["sign"], store=seen, network=Wrong(how))
    state, failed = averaging.initialize(), []
    for number in range(3):
        one = Client(1, second) if second and number == 1 else client(1)
        averaging.uplink.guard = guard if number == 1 else None
        with monkeypatch.context() as patch:
            if how == "undecodable" and number == 1:
                patch.setattr(error_feedback, "is_finite", lambda tensor: False)
            try:
                state, metrics = averaging.next(state, [one, client(2)])
                failed.append(metrics["clients_failed"])
            except TooFewClients as error:  # the guard drops all updates of a round
                state = error.state
                failed.append(2)
        if how == "undecodable" and number == 1:
            assert failed[-1] == 2
    assert failed[0] == failed[2] == 0
    assert bool(failed[1]) == (how != "nothing")
    mine = [serial for client, serial in seen.saved if client == 1]
    assert mine == ([0, 1, 2] if keeps == "the new" else [0, 2])


def test_what_it_kept_is_what_it_adds(process, client, updates):
    """After a lost message, the client continues as if the message had arrived.

    After a crash, its state is unchanged.
    """
    sent: dict[str, bytes] = {}
    for how in ("late", "crash", "nothing"):

        def network(message, key, how=how, wrong=None):
            if (key.client, key.round) == (1, 2):
                sent.setdefault(how, message)  # the first message is the update, the second the report
            return Wrong(how)(message, key)

        # the server's weights do not move, so messages differ only by the residual
        averaging = process(
            upload=CHAINS["sign"],
            network=network,
            server=partial(torch.optim.SGD, lr=0.0),
            client=LocalTraining(lr=0.1),
        )
        state = averaging.initialize()
        for _ in range(3):
            state, _ = averaging.next(state, [client(1), client(2)])
    assert sent["late"] == sent["nothing"] != sent["crash"]


def test_nothing_that_is_not_finite_is_kept(process, client):
    """A residual can overflow its dtype even if the tensor and the decoded tensor do not."""

    @dataclass(frozen=True)
    class HugeNegated(EncodingStage):
        def encoded_spec(self, spec: TensorSpec, side) -> TensorSpec:
            return spec

        def encode(self, x, key):
            return x, {}

        def decode(self, y, side, spec, key):
            return torch.where(y.abs() > 1e30, -y, y)

    seen = Seen()
    upload = ErrorFeedback(StateDictEncoder(Encoder([HugeNegated()])))
    averaging = process(upload=upload, store=seen, client=LocalTraining(lr=0.1))
    huge = {1: {"big.weight": torch.full((16, 784), 1e38)}}
    seen.load = lambda number, attempt, schema: huge.get(number, {})
    _, metrics = averaging.next(averaging.initialize(), [client(1, 1), client(2, 1)])
    assert (1, 0) in seen.saved  # 2e38 does not overflow
    huge[1]["big.weight"] *= 2
    _, metrics = averaging.next(averaging.initialize(), [client(3, 1), client(1, 1)])
    assert metrics["clients_failed/unable"] == 1
    assert seen.saved.keys() == {(1, 0), (2, 0), (3, 0)}
    assert seen.saved[1, 0]["big.weight"].isfinite().all()


@pytest.mark.parametrize("chain", ["sign", "joint", "summed first", "adaptive", "common scale"])
def test_a_network_that_does_nothing_changes_nothing(process, client, chain):
    """The server decodes a copy of the message to the same tensors as the client."""

    def outcome(**more):
        averaging = process(upload=CHAINS[chain], guard=NormGuard("clip", multiple=0.9), **more)
        state = averaging.initialize()
        for _ in range(3):
            state, _ = averaging.next(state, [client(number) for number in range(3)])
        return state.weights, state.norm, state.aggregated_bits

    weights, *others = outcome()
    copied, *same_others = outcome(network=lambda message, key: bytes(bytearray(message)))
    assert same(weights, copied)
    assert others == same_others


def test_a_round_that_too_few_answer_leaves_what_was_sent(process, client):
    seen = Seen()
    averaging = process(upload=CHAINS["sign"], store=seen, min_clients=2, network=Wrong("late"))
    state, _ = averaging.next(averaging.initialize(), [client(1), client(2)])
    with pytest.raises(TooFewClients) as error:
        averaging.next(state, [client(1), client(2)])
    averaging.next(error.value.state, [client(1), client(2)])
    assert seen.saved.keys() == {(number, serial) for number in (1, 2) for serial in range(3)}


def test_without_a_run_folder_a_step_can_be_taken_again_and_another_training_begun(process, client):
    averaging = process(upload=CHAINS["top_k"])

    def two() -> list[dict[str, torch.Tensor]]:
        first, _ = averaging.next(averaging.initialize(), [client(1), client(2)])
        second, _ = averaging.next(first, [client(1), client(3)])
        again, _ = averaging.next(first, [client(1), client(3)])
        assert same(second.weights, again.weights)
        third, _ = averaging.next(second, [client(3), client(2)])
        return [first.weights, second.weights, third.weights]

    assert all(map(same, two(), two()))
    assert len(averaging.store._kept) == 3
    assert all(len(own) <= 2 for own in averaging.store._kept.values())


def test_without_a_run_folder_a_step_can_be_taken_again_with_other_clients(process, client):
    """The clients of the first attempt then keep their earlier state."""

    def trained(*abandoned: int) -> dict[str, torch.Tensor]:
        averaging = process(upload=CHAINS["top_k"])
        state = averaging.initialize()
        for number in abandoned:
            averaging.next(state, [client(number)])
        for number in (2, 1):
            state, _ = averaging.next(state, [client(number)])
        return state.weights

    assert same(trained(), trained(1))


def test_without_the_key_nothing_is_kept(process, client):
    seen = Seen()
    averaging = process(upload=StateDictEncoder(SIGN), broadcast=CHAINS["sign"], store=seen)
    averaging.next(averaging.initialize(), [client(1)])
    assert not seen.saved


def test_structured_clients_have_nothing_to_feed_back(process):
    with pytest.raises(FedqError, match="client.structured cannot go with encoder.upload.error_feedback"):
        process(client=LocalTraining(lr=0.1, structured=True), upload=CHAINS["top_k"])


@pytest.mark.parametrize("way", ["broadcast", "upload"])
def test_a_chain_that_leaves_more_than_it_is_given_is_refused(process, way):
    """A mask of share p that scales by 1 / p leaves 1 / p − 1 of the squares. Without scaling it leaves 1 − p."""

    def one(scale):
        masked = ErrorFeedback(StateDictEncoder(Encoder([RandomMask(0.25, scale=scale)]), 100))
        return process(**{way: masked})

    with pytest.raises(FedqError, match=rf"encoder\.{way}\.error_feedback must be false.* numbers is (2\.9|3\.[01])"):
        one(True)
    one(False)


def test_a_store_that_fails_ends_the_round(process, client):
    class Broken(InMemory):
        def load(self, *args):
            raise FedqError("residual file x cannot be used")

    averaging = process(upload=CHAINS["sign"], store=Broken())
    with pytest.raises(FedqError, match="residual file x"):
        averaging.next(averaging.initialize(), [client(1)])


def test_what_is_left_out_for_good_is_not_fed_back(process):
    chain = StateDictEncoder(Encoder([ZeroOutliers(), UniformQuantization(8)], FixedWidth()), 0)
    with pytest.raises(FedqError, match="encoder.upload.error_feedback must be false with ZeroOutliers"):
        process(upload=ErrorFeedback(chain))
    process(upload=chain)
