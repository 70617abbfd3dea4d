"""Compares two halves that share only bytes, a client's process and a server's process, with the simulation.

The client's process gets the configuration, with its seed, and broadcasts as bytes. Each of its clients starts with an
empty store. The server's process gets the configuration and answers as bytes. All their messages pass through this
process, which compares them with the messages of the simulation.
"""

from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from command import PROCESSES
from encoding.configured import NAMES
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fedq.config import build, build_protocol, build_run, build_server, check
from fedq.data import Client
from fedq.encoding import MessageError
from fedq.learning import Broadcast, ClientFailure, ClientRecord, CohortResult, FederatedAveraging
from fedq.learning.client import ClientHalf
from fedq.learning.cohort import Cohort
from fedq.learning.failures import OtherBase
from fedq.learning.protocol import Protocol
from fedq.learning.round import Answer, Received, Registered
from fedq.models import MLP
from fedq.train import CONF


class Small(MLP):
    """The MLP with layers of 20 units. The first weight has 15,680 elements, and is compressed.

    `shift` is added to the first weights.
    """

    def __init__(self, num_classes: int, shift: float = 0.0) -> None:
        super().__init__(num_classes)
        self.dense1, self.dense2 = nn.Linear(28 * 28, 20), nn.Linear(20, 20)
        self.dense3 = nn.Linear(20, num_classes)
        for parameter in self.parameters():
            parameter.data += shift


CPU = torch.device("cpu")
SMALL = [
    *("dataset=writers", "dataset.clients=4", "dataset.examples_per_client=20", "dataset.test_examples=10"),
    *("model=mlp", "model._target_=test_halves.Small", "run.seed=11", "run.clients_per_round=3"),
]
COHORTS = [[0, 1, 2], [3, 1, 0], [2, 3, 0]]  # client 2 misses a round, and client 3 joins late


def client_process(pipe: Connection) -> None:
    """Serves the clients of one configuration after another."""
    torch.set_num_threads(1)
    while (text := pipe.recv()) is not None:
        cfg = OmegaConf.create(text)
        dataset, precision = build(cfg, "dataset"), build_run(cfg).precision
        half = ClientHalf(Protocol(**build_protocol(cfg, dataset, CPU)), precision)
        stores: dict[int, dict[str, torch.Tensor]] = {}
        held: dict[int, list[Any]] = {}
        last: dict[int, int] = {}
        while (asked := pipe.recv()) is not None:
            number, messages = asked
            own = number if half.protocol.submodels else None
            try:
                theirs = {} if own is None else {"client": own}
                received = half.protocol.receive(messages, held.get(number, []), after=last.get(number, 0), **theirs)
            except OtherBase:
                pipe.send(None)
                continue
            examples, seconds = dataset.client(number).load(), dict.fromkeys(("train", "encode", "decode"), 0.0)
            answer = half.answer(received, number, examples, stores.get(number, {}), seconds)
            pipe.send((answer.messages, answer.report))
            stores[number], held[number] = answer.to_keep, [received.weights, received.reference]
            last[number] = received.attempt


def server_process(pipe: Connection) -> None:
    """Runs the rounds of one configuration after another. The clients are at the other end of the pipe."""
    torch.set_num_threads(1)
    while (text := pipe.recv()) is not None:
        cfg = OmegaConf.create(text)
        dataset = build(cfg, "dataset")
        process = simulated(cfg)

        def ask(
            client: Client, messages: list[bytes], received: Received, record: ClientRecord
        ) -> tuple[Answer, Registered]:
            pipe.send((client.number, messages))
            if (answer := pipe.recv()) is None:
                raise OtherBase("lost", "it has another base")
            answered, report = answer
            record.bits, record.report_bits = 8 * sum(map(len, answered)), 8 * len(report)
            return Answer(answered, report, {}), Registered(client.examples, client.examples)

        cohort = Cohort(process.protocol, process.downlink, process.uplink, ask, map)

        def gather(broadcast: Broadcast, clients: Sequence[Client], cohort: Cohort = cohort) -> CohortResult:
            return cohort.contribute(broadcast, enumerate(clients))

        state = process.initialize()
        for numbers in COHORTS:
            clients = [dataset.client(number) for number in numbers]
            state, metrics = process.next(
                state, clients, lambda b, c, cohort=cohort: cohort.contribute(b, enumerate(c))
            )
        pipe.send(({name: value.numpy() for name, value in state.weights.items()}, metrics))


@pytest.fixture(scope="module")
def halves() -> Iterator[tuple[Connection, Connection]]:
    ends = []
    for target in (client_process, server_process):
        ours, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=target, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        ends.append((ours, process))
    yield ends[0][0], ends[1][0]
    for ours, process in ends:
        ours.send(None)
        process.join(30)
        assert process.exitcode == 0


def simulated(cfg: DictConfig, **more: Any) -> FederatedAveraging:
    dataset = build(cfg, "dataset")
    return FederatedAveraging(
        **build_protocol(cfg, dataset, CPU), server=build_server(cfg), population=dataset.num_clients, **more
    )


def configuration(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*SMALL, *overrides])
    check(cfg)
    return cfg


def same_bytes(
    cfg: DictConfig, halves: tuple[Connection, Connection], of_client: DictConfig | None = None
) -> tuple[dict[str, float], list[int]]:
    """Asserts that both halves, in two processes, send the simulation's messages and end with its weights.

    Returns the metrics, and the bits of the messages that were sent again to clients with another base.
    `of_client` is the client's configuration if it differs.
    """
    simulation: dict[tuple[int, int], list[bytes]] = {}

    def record(message: bytes, key: Any) -> bytes:
        simulation.setdefault((key.round, key.client), []).append(message)
        return message

    process, dataset = simulated(cfg, network=record), build(cfg, "dataset")
    state = process.initialize()
    for numbers in COHORTS:
        state, metrics = process.next(state, [dataset.client(number) for number in numbers])
    assert metrics["clients_failed"] == 0
    clients, server = halves
    clients.send(as_text(of_client or cfg))
    server.send(as_text(cfg))
    again = []
    for round_, numbers in enumerate(COHORTS):
        for _ in numbers:
            number, messages = server.recv()
            assert all(isinstance(message, bytes) for message in messages)
            clients.send((number, messages))
            if (answer := clients.recv()) is None:
                server.send(None)
                number, messages = server.recv()
                again.append(8 * sum(map(len, messages)))
                clients.send((number, messages))
                answer = clients.recv()
            answered, report = answer
            assert [*answered, report] == simulation[round_, number]
            server.send((answered, report))
    clients.send(None)
    weights, its_metrics = server.recv()
    assert all(torch.equal(state.weights[name], torch.from_numpy(value)) for name, value in weights.items())
    bits = [name for name in metrics if "bits" in name]
    metrics["cumulative_broadcasted_bits"] += sum(again)
    assert {name: metrics[name] for name in bits} == {name: its_metrics[name] for name in bits}
    return metrics, again


def as_text(cfg: DictConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_encoder(name: str, halves: tuple[Connection, Connection]) -> None:
    structured = ["client=structured"] if name == "structured_mask" else []
    same_bytes(configuration(f"encoder={name}", *structured), halves)


@pytest.mark.parametrize(
    "overrides",
    [
        ["encoder=top_k", "encoder.upload.error_feedback=true"],
        ["encoder=frontier", "encoder.upload.error_feedback=true"],
        ["encoder=uint8", "encoder.broadcast.error_feedback=true"],
        ["encoder=frontier", "encoder.broadcast.reference=last"],
        ["encoder=frontier", "run/submodel=some"],
        ["encoder=adaptive_clip", "run/submodel=some"],
        ["encoder=uint8", "algorithm=scaffold"],
        ["encoder=bit_budget", "algorithm=scaffold"],
        ["encoder=uint8", "algorithm=fednova", "client.momentum=0.5"],
    ],
    ids=" ".join,
)
def test_state_of_clients_and_server(overrides: list[str], halves: tuple[Connection, Connection]) -> None:
    metrics, _ = same_bytes(configuration(*overrides), halves)
    if "encoder.broadcast.reference=last" in overrides:  # client 3 joined late, and client 2 missed a round
        assert metrics["broadcast_bits"] > 3 * metrics["cumulative_broadcasted_bits"] / 9


FROZEN = ["encoder=uint8", "encoder.threshold=100", "algorithm.frozen=[dense1.*]"]
BASE = 4 * (784 * 20 + 20)


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ([], BASE),
        (["+encoder.broadcast.reference=initial"], BASE + 4 * (20 * 20 + 20 + 20 * 10 + 10)),
        (["+encoder.broadcast.reference=last"], BASE),
        (["run/submodel=some"], BASE),
        (["algorithm=scaffold"], BASE),
        (["encoder.upload.error_feedback=true"], BASE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_client_with_another_base_is_sent_the_base_once(
    overrides: list[str], size: int, halves: tuple[Connection, Connection]
) -> None:
    """The frozen layer has 15,700 parameters, the others have 630. The same messages are sent again after the base."""
    _, nothing = same_bytes(configuration(*FROZEN, *overrides), halves)
    assert nothing == []
    other = configuration(*FROZEN, *overrides, "+model.shift=0.01")
    _, again = same_bytes(configuration(*FROZEN, *overrides), halves, other)
    # with reference=last each client asks once: messages build on first weights, and these differ
    assert len(again) == (4 if "+encoder.broadcast.reference=last" in overrides else 1)
    assert all(size < bits / 8 < size + 8 * 700 for bits in again)


def test_other_frozen_tensors_change_the_fingerprint_of_both_directions() -> None:
    ours, theirs = (
        simulated(configuration(*FROZEN, f"+model.shift={shift}")).protocol.weights for shift in (0.0, 0.01)
    )
    assert ours.broadcast.fingerprint({}) != theirs.broadcast.fingerprint({})
    assert ours.upload.fingerprint({}) != theirs.upload.fingerprint({})


def test_a_client_of_another_model_stays_lost() -> None:
    ours, theirs = (simulated(configuration(*FROZEN, *more)).protocol for more in ([], ["encoder.bits=4"]))
    process = simulated(configuration(*FROZEN))
    broadcast, _ = process.downlink.open(process.initialize(), [0])
    with pytest.raises(OtherBase, match="the two sides differ in model, encoder"):
        theirs.receive(broadcast.messages)
    messages = process.downlink.with_base(broadcast, broadcast.messages)
    assert set(ours.receive(messages).weights) == set(ours.parts.travels)
    with pytest.raises(OtherBase, match="the two sides differ in model, encoder") as failure:
        theirs.receive(messages)
    assert failure.value.kind == "lost"


def test_a_client_that_lost_its_store_says_so(halves: tuple[Connection, Connection]) -> None:
    cfg = configuration("encoder=frontier", "encoder.broadcast.reference=last")
    process, dataset = simulated(cfg), build(cfg, "dataset")
    state = process.initialize()
    for numbers in COHORTS[:2]:
        state, _ = process.next(state, [dataset.client(number) for number in numbers])
    broadcast, _ = process.downlink.open(state, [0])
    assert isinstance(broadcast, Broadcast)
    with pytest.raises(ClientFailure, match="does not hold the weights") as failure:
        process.protocol.receive(process.downlink.messages(broadcast, 0))
    assert failure.value.kind == "lost"
    assert isinstance(process.contribute(broadcast, []), CohortResult)


@pytest.mark.parametrize("options", [["encoder=uint8"], ["encoder=frontier", "encoder.broadcast.reference=last"]])
def test_a_recorded_broadcast_of_an_earlier_round_is_refused(options: list[str]) -> None:
    cfg = configuration(*options)
    process, dataset = simulated(cfg), build(cfg, "dataset")
    state, recorded = process.initialize(), []
    for _ in range(2):
        broadcast, _ = process.downlink.open(state, [0])
        recorded.append(process.downlink.messages(broadcast, 0))
        state, _ = process.next(state, [dataset.client(0)])
    receive = process.protocol.receive
    first = receive(recorded[0])
    second = receive(recorded[1], [first.weights, first.reference], after=first.attempt)
    assert (first.attempt, second.attempt) == (0, 1)
    again = receive(recorded[1], [first.weights, first.reference], after=1)  # the answer was lost
    assert all(torch.equal(value, again.weights[name]) for name, value in second.weights.items())
    with pytest.raises(MessageError, match="the broadcast of attempt 0 is older than the last one, 1"):
        receive(recorded[0], [first.weights, first.reference], after=1)
