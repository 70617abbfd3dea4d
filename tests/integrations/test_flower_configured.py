"""The Flower app of a fedq configuration, on nodes in this process, against the simulation."""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: make test-flower installs it")

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.cli.utils import validate_project_name
from flwr.clientapp import ClientApp
from test_halves import FROZEN, SMALL, configuration, simulated

from experiments.flower.nodes import Nodes, array_of
from fedq.config import build, build_run
from fedq.data import Client
from fedq.errors import FedqError
from fedq.integrations.flower import __main__ as command
from fedq.integrations.flower import client, server
from fedq.simulation.checkpoint import load
from fedq.simulation.loop import rounds


def app(folder: Path, *overrides: str) -> Path:
    command.new(folder, [*SMALL, *overrides])
    return folder / "config.yaml"


def on_flower(folder: Path, grid: Nodes, timeout: float = 10.0) -> tuple[dict[str, torch.Tensor], list[dict]]:
    cfg = client.configuration_of(folder / "config.yaml")
    server.train(cfg, grid, folder / "out", timeout)
    state, _ = load(folder / "out" / "checkpoints" / f"round_{build_run(cfg).rounds:06d}.pt")
    return state.weights, [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        ["encoder=uint8"],
        ["encoder=frontier"],
        ["encoder=frontier", "encoder.broadcast.reference=last"],
        ["encoder=top_k", "encoder.upload.error_feedback=true"],
        ["encoder=bit_budget", "algorithm=scaffold"],
        ["encoder=uint8", "run/submodel=some"],
        ["encoder=uint8", "client.max_examples=7"],
        [*FROZEN],
    ],
    ids=" ".join,
)
def test_the_weights_are_those_of_the_simulation(overrides: list[str], tmp_path: Path) -> None:
    path = app(tmp_path, "run.rounds=3", *overrides)
    cfg = configuration("run.rounds=3", *overrides)
    process, dataset = simulated(cfg), build(cfg, "dataset")
    *_, (state, metrics) = rounds(process, process.initialize(), dataset, build_run(cfg))
    client._half.cache_clear()
    weights, lines = on_flower(tmp_path, Nodes([client.client_app(path) for _ in range(4)]))
    assert all(torch.equal(state.weights[name], value) for name, value in weights.items())
    skipped = {name for name in metrics if name.startswith("seconds")}
    assert {n: v for n, v in lines[-1].items() if n not in skipped} == {
        n: v for n, v in metrics.items() if n not in skipped
    }


@pytest.fixture
def as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message goes to a new process of the app, which has only the node's state."""
    cached = client._half.__wrapped__
    monkeypatch.setattr(client, "_half", cached)


@pytest.mark.parametrize("reference", ["none", "last"])
@pytest.mark.usefixtures("as_processes")
def test_a_node_with_another_base_is_sent_the_base_once(reference: str, tmp_path: Path) -> None:
    settings = [*FROZEN, "run.rounds=3", f"+encoder.broadcast.reference={reference}"]
    ours, theirs = app(tmp_path, *settings), app(tmp_path / "theirs", *settings, "+model.shift=0.01")
    cfg = configuration(*settings)
    process, dataset = simulated(cfg), build(cfg, "dataset")
    *_, (state, metrics) = rounds(process, process.initialize(), dataset, build_run(cfg))
    grid = Nodes(client.client_app(theirs if i == 1 else ours) for i in range(4))
    weights, lines = on_flower(tmp_path, grid)
    assert [line["clients_failed"] for line in lines] == [0, 0, 0]
    assert all(torch.equal(state.weights[name], value) for name, value in weights.items())
    again = lines[-1]["cumulative_broadcasted_bits"] - metrics["cumulative_broadcasted_bits"]
    assert 8 * 62_800 < again < 8 * 2 * 62_800  # once, though client 1 is in several rounds


def test_a_cut_message_and_a_silent_node_are_left_out(tmp_path: Path) -> None:
    """Client 1's message of the first round is cut, client 2's reply is lost, and client 3 joins after a round."""
    path = app(tmp_path, "encoder=uint8", "run.rounds=4", "run.clients_per_round=4", "dataset.clients=4")
    seen: list[int] = []

    def network(message: Message) -> Message | None:
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != 1:
            return message
        seen.append(message.metadata.src_node_id)
        if seen.count(1001) == 1 and seen[-1] == 1001:
            record = message.content["answer"]
            record["0"] = array_of(record["0"].data[:-7])
        return None if seen[-1] == 1002 and seen.count(1002) == 1 else message

    grid = Nodes([client.client_app(path) for _ in range(4)], network)
    late = grid.apps.pop(1003)

    class Waiting(server.Nodes):
        def wait_for(self, count: int) -> None:
            super().wait_for(count - 1)

        def clients(self, attempt: int, numbers: Iterable[int]) -> list[Client]:
            if attempt == 1:
                grid.apps[1003] = late
            return super().clients(attempt, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "Nodes", Waiting)
        _, lines = on_flower(tmp_path, grid, timeout=1.0)
    assert [line["clients"] for line in lines] == [1, 4, 4, 4]
    assert [line["clients_failed/refused"] for line in lines] == [1, 0, 0, 0]
    assert [line["clients_failed/silent"] for line in lines] == [2, 0, 0, 0]


def test_a_damaged_broadcast_is_refused_by_the_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = app(tmp_path, "encoder=uint8", "run.rounds=1")

    def network(message: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            data = bytearray(message.content["broadcast"]["0"].data)
            data[1000] ^= 1
            message.content["broadcast"]["0"] = array_of(bytes(data))
        return message

    _, (line,) = on_flower(tmp_path, Nodes([client.client_app(path) for _ in range(4)], network))
    assert line["clients_failed"] == line["clients_failed/unable"] == 1
    assert "client 1 is left out: the checksum does not fit: the message was damaged on its way" in caplog.text


@pytest.mark.parametrize(
    "numbers",
    [
        {"client": 1, "examples": -5, "targets": 5},
        {"client": 1, "examples": 5.5, "targets": 5},
        {"client": 1, "examples": 2**62, "targets": 5},
        {"client": 1, "examples": 5},
        {"client": [1], "examples": 5, "targets": 5},
    ],
    ids=str,
)
def test_a_node_that_registers_no_numbers_is_left_out(numbers: dict, tmp_path: Path) -> None:
    path = app(tmp_path, "encoder=uint8")
    node, honest = ClientApp(), client.client_app(path)

    @node.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"registered": MetricRecord(numbers)}), reply_to=message)

    cfg = client.configuration_of(path)
    nodes = server.Nodes(Nodes([honest, node]), simulated(cfg), 1.0)
    nodes.wait_for(1)
    assert [one.examples > 0 for one in nodes.clients(0, [0, 1])] == [True, False]


@pytest.mark.parametrize("claimed", [(6, 6), (7, 8), (7, 0), (700, 700), None], ids=str)
def test_a_client_cannot_claim_a_larger_weight(claimed: tuple[int, int] | None, tmp_path: Path) -> None:
    """Client 1 has more than 7 examples, uses 7, and claims other numbers in its reply."""
    path = app(tmp_path, "encoder=uint8", "client.max_examples=7", "run.rounds=1")

    def network(message: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.src_node_id == 1001:
            numbers = {} if claimed is None else {"examples": claimed[0], "targets": claimed[1]}
            message.content["registered"] = MetricRecord(numbers)
        return message

    _, (line,) = on_flower(tmp_path, Nodes([client.client_app(path) for _ in range(4)], network))
    assert line["clients_failed/refused"] == 1
    assert line["clients"] == 2


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("run/faults=some", "run.faults must be null"),
        ("+run.evaluate_clients=all", "run.evaluate_clients must be null"),
        ("+run.validation=0.2", "run.validation must be null or own"),
        ("algorithm.personal=[dense3.*]", "algorithm.personal must be empty"),
    ],
)
def test_a_configuration_that_needs_clients_on_the_server_is_refused(override: str, text: str, tmp_path: Path) -> None:
    path = app(tmp_path, override)
    with pytest.raises(FedqError, match=text):
        server.train(client.configuration_of(path), Nodes([]), tmp_path / "out", 1.0)


def test_a_node_that_starts_again_takes_the_place_of_the_earlier_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = app(tmp_path)
    grid = Nodes([client.client_app(path)])
    nodes = server.Nodes(grid, simulated(client.configuration_of(path)), 1.0)
    nodes.wait_for(1)
    grid.connect(client.client_app(path), 0)
    nodes.clients(0, [0])
    assert nodes._clients[0][0] == 1001
    assert "node 1001 takes the place of another node as client 0" in caplog.text
    del grid.apps[1001]
    nodes.clients(0, [0])
    assert nodes._clients == {}  # the earlier node is not asked again


def test_a_node_without_a_number_says_how_to_start_it(tmp_path: Path) -> None:
    path, grid = app(tmp_path), Nodes([])
    for place in (4, -1, "0"):
        grid.connect(client.client_app(path), place)
    server.Nodes(grid, simulated(client.configuration_of(path)), 1.0)._register()
    assert grid.errors == [
        f"fedq: the node's partition-id must be from 0 to 3, not {place}: start the SuperNode with "
        '--node-config "partition-id=0"'
        for place in (4, -1, 0)
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pathspec, which flwr uses
@pytest.mark.parametrize("folder", ["my_app", "7", "_", "ä" * 40, "frontier.2026-12-01.with_a_long_name_of_40_letters"])
def test_flower_takes_the_app(folder: str, tmp_path: Path) -> None:
    app(tmp_path / folder)
    project = tomllib.loads((tmp_path / folder / "pyproject.toml").read_text())
    validate_project_name(project["project"]["name"], "app")
    assert b"config.yaml" in build_fab_from_disk(tmp_path / folder)


def test_the_command_writes_four_files_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["new", str(tmp_path / "one"), *SMALL])
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        *("config.yaml", "pyproject.toml", "client_app.py", "server_app.py")
    }
    assert '--federation-config "num-supernodes=4"' in capsys.readouterr().out
    for arguments, text in (
        (["new", str(tmp_path / "one")], "holds files; name a new folder"),
        (["new", str(tmp_path / "two"), "encoder=uint9"], "uint9"),
        (["new", str(tmp_path / "two"), "encoder.bitz=9"], "bitz"),
        (["new", str(tmp_path / "one" / "config.yaml")], "exists"),
        (["new", "encoder=uint8"], "usage"),
        ([], "usage"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert text in str(ended.value) and len(str(ended.value).splitlines()) == 1
    assert not (tmp_path / "two").exists()
