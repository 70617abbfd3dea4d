"""The mod and the strategy wrapper, on nodes in this process."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: make test-flower installs it")

from encoding.configured import NAMES, built
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum

import fedq.integrations
from experiments.flower.fuzz import fuzz
from experiments.flower.nodes import Nodes, app_of, array_of, first_weights
from fedq.encoding import (
    BitBudget,
    Encoder,
    EncodingStage,
    FixedWidth,
    FollowLoss,
    Key,
    StateDictEncoder,
    TensorSpec,
    TopK,
    UniformQuantization,
    schema_of,
)
from fedq.encoding import message as frame
from fedq.encoding.schema import canonical_text
from fedq.errors import FedqError
from fedq.integrations.flower import Compressed, compression
from fedq.integrations.flower.agreement import Agreement
from fedq.learning import ErrorFeedback

UINT8 = StateDictEncoder(Encoder([UniformQuantization(bits=8)], FixedWidth()))
EXACT = StateDictEncoder()
FRACTION = {"fraction_train": 1.0, "min_train_nodes": 2, "min_evaluate_nodes": 2, "min_available_nodes": 2}


def run(strategy, grid: Nodes, rounds: int = 3):
    random.seed(0)  # Flower draws the order of nodes
    return strategy.start(grid=grid, initial_arrays=first_weights(), num_rounds=rounds)


def plain(rounds: int = 3, strategy: type = FedAvg, **arguments):
    seen: list = []
    grid = Nodes([app_of(0.01, [], seen), app_of(0.02, [], seen, examples=3)])
    return run(strategy(**FRACTION, **arguments), grid, rounds).arrays.to_torch_state_dict(), seen


def wrapped(broadcast, upload, rounds: int = 3, strategy: type = FedAvg, network=lambda m: m, mods=None, **arguments):
    seen: list = []
    mods = mods or [compression()]
    grid = Nodes([app_of(0.01, mods, seen), app_of(0.02, mods, seen, examples=3)], network)
    result = run(Compressed(strategy(**FRACTION, **arguments), broadcast, upload), grid, rounds)
    return result, seen, grid


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam, Krum])
def test_exact_messages_change_nothing(strategy):
    """An integer array is an exception: Flower averages it as float64 and returns float64."""
    expected, seen = plain(strategy=strategy)
    result, seen_through_fedq, grid = wrapped(EXACT, EXACT, strategy=strategy)
    weights = result.arrays.to_torch_state_dict()
    assert grid.errors == []
    assert weights["norm.num_batches_tracked"].dtype == torch.int64
    if strategy is FedAvg:  # Adam moves a counter by its rate
        assert weights["norm.num_batches_tracked"] == 3
    for one, other in zip([*seen, expected], [*seen_through_fedq, weights], strict=True):
        names = [name for name in one if "tracked" not in name]
        if strategy is FedAdam:  # its arrays become float64, which the wrapper casts back
            assert all(torch.allclose(one[name].float(), other[name], atol=1e-5) for name in names)
        else:
            assert all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize(
    ("broadcast", "upload"),
    [
        (UINT8, UINT8),
        (UINT8, EXACT),
        (StateDictEncoder(UINT8.encoder, reference="last"), UINT8),
        (StateDictEncoder(UINT8.encoder, reference="initial"), UINT8),
        (ErrorFeedback(UINT8), ErrorFeedback(StateDictEncoder(Encoder([TopK(fraction=0.9)])))),
        (StateDictEncoder(UINT8.encoder, common_scale=True, rate_control=BitBudget(8.0)), UINT8),
        (UINT8, StateDictEncoder(UINT8.encoder, common_scale=True, rate_control=FollowLoss())),
    ],
    ids=lambda way: canonical_text(way).replace("StateDictEncoder", "")[:60],
)
def test_compressed_training_stays_near_plain_training(broadcast, upload):
    expected, _ = plain()
    result, _, grid = wrapped(broadcast, upload)
    assert grid.errors == []
    weights = result.arrays.to_torch_state_dict()
    moved = (expected["dense.weight"] - first_weights().to_torch_state_dict()["dense.weight"]).norm()
    assert 0 < (weights["dense.weight"] - expected["dense.weight"]).norm() < 0.1 * moved
    for name in ("dense.bias", "norm.running_var"):
        assert torch.allclose(weights[name], expected[name], atol=1e-6)
    assert torch.equal(weights["norm.num_batches_tracked"], torch.tensor(3))


ONE_NODE = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
TOP_K = StateDictEncoder(Encoder([TopK(fraction=0.05)]))


def test_what_a_node_does_not_send_is_in_its_residual():
    """The server's weights plus the node's residual are the first weights plus all that the app has added."""
    seen: list = []
    grid = Nodes([app_of(0.01, [compression()], seen)])
    weights = run(Compressed(FedAvg(**ONE_NODE), EXACT, ErrorFeedback(TOP_K)), grid, 4).arrays.to_torch_state_dict()
    added = sum(np.random.default_rng([1000, number]).standard_normal((40, 300)) for number in range(1, 5)) * 0.01
    residual = grid.apps[1000][1].state["fedq.residual"].to_torch_state_dict()
    assert residual.keys() == {"dense.weight"}
    assert residual["dense.weight"].count_nonzero() > 10_000
    expected = first_weights().to_torch_state_dict()["dense.weight"] + torch.from_numpy(added).float()
    assert torch.allclose(weights["dense.weight"] + residual["dense.weight"], expected, atol=1e-6)


def test_what_the_server_does_not_send_is_in_the_next_broadcast():
    """The weights stay the same, and a coarse broadcast is right on average (Karimireddy 2019)."""
    seen: list = []
    coarse = StateDictEncoder(Encoder([UniformQuantization(bits=3, rounding="nearest")], FixedWidth()))
    grid = Nodes([app_of(0.0, [compression()], seen)])
    compressed = Compressed(FedAvg(**ONE_NODE), ErrorFeedback(coarse), EXACT)
    run(compressed, grid, 5)
    weights = first_weights().to_torch_state_dict()["dense.weight"]
    errors = [weights - one["dense.weight"] for one in seen]
    assert torch.allclose(sum(errors), compressed._residual["dense.weight"], atol=1e-6)
    assert sum(errors).norm() < 2 * errors[0].norm()


def test_adaptive_parts_of_both_directions_follow_the_rounds():
    compressed = Compressed(FedAvg(**FRACTION), built("bit_budget", "broadcast"), built("bit_budget", "upload"))
    grid = Nodes(app_of(0.01, [compression()]) for _ in range(2))
    run(compressed, grid, 6)
    assert grid.errors == []
    for state in compressed._states:
        assert state["*pace/0/factor"] != 1
        assert state["*pace/0/before"][1] > 0  # bits a parameter of the last messages


def test_metrics_count_the_bytes_of_all_arrays():
    sent: list[tuple[int, int]] = []  # node of destination or 1 for the server, bytes

    def network(message: Message) -> Message:
        if message.has_content():
            arrays = [array for record in message.content.array_records.values() for array in record.values()]
            sent.append((message.metadata.dst_node_id, sum(len(array.data) for array in arrays)))
        return message

    result, _, _ = wrapped(UINT8, UINT8, rounds=2, network=network)
    up = sum(size for node, size in sent if node == 1)
    assert sum(m["fedq-bytes-up"] for m in result.train_metrics_clientapp.values()) == up
    of_both = (result.train_metrics_clientapp, result.evaluate_metrics_clientapp)
    assert sum(m["fedq-bytes-down"] for one in of_both for m in one.values()) == sum(s for _, s in sent) - up
    first, second = (result.train_metrics_clientapp[r]["fedq-bytes-down"] for r in (1, 2))
    agreement = Agreement(schema_of(first_weights().to_torch_state_dict()), UINT8, UINT8, 0)
    assert first - second == 2 * len(agreement.contact)  # from then on messages alone
    assert second == 2 * (12_000 + 4 * 40 * 5 + 8 + frame.OVERHEAD + 8)  # 8 bits, the rest exact, minimum and maximum


def test_the_first_weights_travel_once_for_a_reference():
    down = StateDictEncoder(UINT8.encoder, reference="last")
    result, _, _ = wrapped(down, UINT8)
    first, second, third = (result.train_metrics_clientapp[r]["fedq-bytes-down"] for r in (1, 2, 3))
    assert first - second > 2 * 48_000
    assert second == third


def test_with_reference_last_a_node_that_missed_a_round_gets_the_reference():
    down, sizes = StateDictEncoder(UINT8.encoder, reference="last"), {1000: [], 1001: [], 1002: []}

    def network(message: Message) -> Message:
        if (node := message.metadata.dst_node_id) in sizes:
            sizes[node].append({name: len(a.data) for name, a in message.content["arrays"].items()})
        return message

    apps = [app_of(0.01, [compression()]) for _ in range(3)]
    grid = Nodes(apps, network)
    strategy = FedAvg(fraction_train=0.67, fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    run(Compressed(strategy, down, UINT8), grid, rounds=8)
    assert grid.errors == []
    later = [one.keys() for own in sizes.values() for one in own[1:]]
    assert {"fedq.message", "fedq.reference"} in later
    assert {"fedq.message"} in later
    assert all("fedq.contact" in own[0] and "fedq.contact" not in one for own in sizes.values() for one in own[1:])


def test_every_encoder_travels_to_a_node():
    schema = {"weight": TensorSpec((30, 20), torch.float32)}
    for name in NAMES:
        ours = Agreement(schema, built(name, "broadcast"), built(name, "upload"), 5)
        theirs = Agreement.read(ours.contact)
        assert theirs.contact == ours.contact
        for way in ("broadcast", "upload"):
            one, other = (getattr(side.group, way) for side in (ours, theirs))
            assert one.fingerprint({}) == other.fingerprint({}), name


@dataclass(frozen=True)
class HalfWidth(EncodingStage):
    """A stage of a user."""

    def encoded_spec(self, spec, side):
        return TensorSpec(spec.shape, torch.bfloat16)

    def encode(self, x, key):
        return x.to(torch.bfloat16), {}

    def decode(self, y, side, spec, key):
        return y.to(spec.dtype)


def test_a_stage_of_a_user_is_given_on_both_sides():
    own = StateDictEncoder(Encoder([HalfWidth()]))
    _, _, grid = wrapped(UINT8, own, mods=[compression(own)])
    assert grid.errors == []
    _, _, grid = wrapped(UINT8, own, rounds=1)
    assert "there is no class 'test_flower_compression.HalfWidth'" in grid.errors[0]
    _, _, grid = wrapped(UINT8, UINT8, rounds=1, mods=[compression(own)])
    assert "compression(upload=…) of this node is not the upload of the server's Compressed" in grid.errors[0]


def test_options_that_a_direction_does_not_have():
    for ways, text in (
        ((UINT8, StateDictEncoder(reference="last")), "upload.reference must be none"),
        ((StateDictEncoder(UINT8.encoder, common_scale=True, rate_control=FollowLoss()), UINT8), "rate_control"),
    ):
        with pytest.raises(FedqError, match=text):
            wrapped(*ways, rounds=1)
    upload = StateDictEncoder(UINT8.encoder, common_scale=True, rate_control=FollowLoss())
    _, _, grid = wrapped(UINT8, upload, rounds=1, mods=[compression(loss="val_loss")])
    assert "the reply has no metric 'val_loss'" in grid.errors[0]


def test_a_side_without_fedq():
    grid = Nodes([app_of(0.01, []) for _ in range(2)])
    result = run(Compressed(FedAvg(**FRACTION), UINT8, UINT8), grid, rounds=1)
    assert result.arrays is None or not len(result.arrays)
    assert "Unsupported serialization type" in grid.errors[0]
    grid = Nodes([app_of(0.01, [compression()]) for _ in range(2)])
    run(FedAvg(**FRACTION), grid, rounds=1)
    assert "no message of fedq" in grid.errors[0]


def without_state(grid: Nodes, node: int) -> None:
    grid.apps[node][1].state.clear()


def test_a_node_that_lost_its_state_gets_everything_again():
    failures = []

    class Forgetful(FedAvg):
        def configure_train(self, server_round, *arguments):
            if server_round == 2:
                without_state(grid, 1000)
            return super().configure_train(server_round, *arguments)

        def aggregate_train(self, server_round, replies):
            failures.append(sum(reply.has_error() for reply in replies))
            return super().aggregate_train(server_round, replies)

    mods = [compression()]
    grid = Nodes([app_of(0.01, mods), app_of(0.02, mods)])
    run(Compressed(Forgetful(**FRACTION, fraction_evaluate=0.0), UINT8, UINT8), grid)
    assert failures == [0, 1, 0]
    assert grid.errors == ["fedq: this node has no state of this run: the server must send the first contact again"]


def test_another_version_of_fedq(monkeypatch):
    """The second node's messages have another format."""

    def newer(message: Message) -> Message:
        if message.metadata.dst_node_id != 1001:
            return message
        record = message.content["arrays"]
        for name, array in record.items():
            record[name] = array_of(array.data[:4] + b"\5" + array.data[5:])
        return message

    result, _, grid = wrapped(UINT8, UINT8, rounds=1, network=newer, fraction_evaluate=0.0)
    assert grid.errors == ["fedq: the message has format version 5.0, this program reads 4.0"]
    assert len(result.arrays)


@pytest.mark.parametrize(
    ("broadcast", "upload"),
    [
        (UINT8, UINT8),
        (StateDictEncoder(UINT8.encoder, reference="last"), ErrorFeedback(UINT8)),
        (UINT8, StateDictEncoder(UINT8.encoder, common_scale=True, rate_control=BitBudget(8.0))),
    ],
    ids=["uint8", "state", "adaptive"],
)
def test_damaged_records_are_refused_or_harmless(broadcast, upload):
    counts = fuzz(0, 40, broadcast, upload)
    assert counts["mod"] > 20 and counts["wrapper"] > 20


def test_a_reply_of_another_round_or_node_is_refused():
    old: dict[int, ArrayRecord] = {}
    seen: list[str] = []

    class Strategy(FedAvg):
        def aggregate_train(self, server_round, replies):
            seen.extend(reply.error.reason for reply in replies if reply.has_error())
            return super().aggregate_train(server_round, replies)

    def replay(message: Message) -> Message:
        if message.metadata.dst_node_id == 1 and message.metadata.src_node_id == 1000:
            record = message.content["arrays"]
            if old:
                message.content = RecordDict({**message.content, "arrays": old[0]})
            old.setdefault(0, record)
        return message

    mods = [compression()]
    grid = Nodes([app_of(0.01, mods), app_of(0.02, mods)], replay)
    run(Compressed(Strategy(**FRACTION, fraction_evaluate=0.0), UINT8, UINT8), grid, rounds=2)
    assert seen == ["fedq: the message is of seed 0, round 1, client 1000; expected seed 0, round 2, client 1000"]


def test_the_contact_is_checked():
    agreement = Agreement({"w": TensorSpec((3,), torch.float32)}, UINT8, UINT8, 7)
    text = json.loads(agreement.contact[44:-4])
    changes: list[Callable[[dict], object]] = [
        lambda c: c.update(upload={"": "os.system", "command": "true"}),
        lambda c: c.update(upload={"": "UniformQuantization", "bits": 8}),
        lambda c: c.update(broadcast=[[[]]]),
        lambda c: c.update(schema=[["w", [-3], "torch.float32"]]),
        lambda c: c.update(schema=[["w", [3], "torch.os"]]),
        lambda c: c.pop("seed"),
    ]
    for change in changes:
        content = json.loads(json.dumps(text))
        change(content)
        contact = frame.pack([json.dumps(content).encode()], b"contact1", Key(7, 0))
        with pytest.raises(FedqError) as error:
            Agreement.read(contact)
        assert "cannot be built here" in str(error.value) and "\n" not in str(error.value)


def test_the_python_code_of_the_guide_runs():
    guide = Path(fedq.integrations.__file__).with_name("README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert isinstance(names["strategy"], Compressed)
    assert isinstance(names["app"], ClientApp)
