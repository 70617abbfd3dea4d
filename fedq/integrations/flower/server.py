"""The ServerApp of a fedq configuration: the server's half of a round, with clients on Flower's nodes."""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from fedq.config import ConfigError, build, build_protocol, build_run, build_server, to_container
from fedq.data import Client
from fedq.encoding import Key, MessageError
from fedq.errors import FedqError
from fedq.integrations.flower.client import REPORT, configuration_of
from fedq.integrations.flower.records import packed, unpacked
from fedq.learning import Broadcast, ClientFailure, ClientRecord, CohortResult, FederatedAveraging, Registered
from fedq.learning.cohort import Cohort
from fedq.learning.failures import FAILURES, OtherBase
from fedq.learning.round import Answer, Received, timed
from fedq.simulation import checkpoint
from fedq.simulation.loop import rounds
from fedq.simulation.run import own_device
from fedq.simulation.workers import Workers
from fedq.tracking.headline import Headline
from fedq.tracking.metrics import MetricsFile
from fedq.tracking.summary import Summary

log = logging.getLogger("flwr")

_GONE = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
_REFUSED = {
    "run.faults": "real networks have faults of their own",
    "run.evaluate_clients": "the server does not read clients' examples",
    "run.patience": "a run on Flower does all rounds",
}


def server_app(configuration: Path) -> ServerApp:
    """Returns the ServerApp of a configuration that `python -m fedq.integrations.flower new` wrote.

    The app's own configuration has two keys. `output` is the folder below which the run writes its files. A node that
    has not answered after `timeout` seconds is left out.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        """Does all rounds of the configuration."""
        folder = Path(str(context.run_config.get("output", "outputs/flower"))) / str(context.run_id)
        train(configuration_of(configuration), grid, folder, float(context.run_config.get("timeout", 3600)))

    return app


def train(cfg: DictConfig, grid: Grid, folder: Path, timeout: float) -> None:
    """Does all rounds of a checked configuration; writes metrics.jsonl, summary.json and checkpoints to `folder`.

    grid: Flower's connection to the nodes.
    timeout: Seconds after which a node that has not answered is left out.

    Raises FedqError with one clear sentence.
    """
    run, config = build_run(cfg), to_container(cfg)
    for key, reason in _REFUSED.items():
        if getattr(run, key.removeprefix("run.")) is not None:
            raise ConfigError(f"{key} must be null on Flower: {reason}")
    if isinstance(run.validation, float):
        raise ConfigError("run.validation must be null or own on Flower: the server holds out no clients' examples")
    dataset = build(cfg, "dataset")
    process = FederatedAveraging(
        **build_protocol(cfg, dataset, own_device(run.device)),
        server=build_server(cfg),
        guard=build(cfg, "run.guard") if run.guard else None,
        min_clients=run.min_clients,
        precision=run.precision,
        population=dataset.num_clients,
    )
    protocol = process.protocol
    if protocol.parts.personal:
        raise ConfigError(
            "algorithm.personal must be empty on Flower: the server cannot evaluate with tensors of clients"
        )
    nodes = Nodes(grid, process, timeout)
    nodes.wait_for(run.clients_per_round)
    folder.mkdir(parents=True, exist_ok=True)
    state = process.initialize()
    exact = protocol.exact.encode(protocol.parts.travelling(state.weights), Key(run.seed)).message
    # a thread for each client of a cohort waits for the client's answer
    with closing(MetricsFile(folder)) as file, Summary(folder) as summary, Workers(run.clients_per_round) as workers:
        summary.start(config, 8 * len(exact), Headline(protocol.task.headline, protocol.task.more_is_better))
        cohort = Cohort(protocol, process.downlink, process.uplink, nodes.ask, workers.map)

        def gather(broadcast: Broadcast, clients: Sequence[Client]) -> CohortResult:
            return cohort.contribute(broadcast, enumerate(clients))

        for after, metrics in rounds(process, state, dataset, run, nodes.clients, gather):
            state = after
            for tracker in (file, summary):
                tracker.write(metrics)
            if state.round % run.checkpoint_every == 0 or state.round == run.rounds:
                checkpoint.save(state, config, folder / "checkpoints", run.keep)
            shown = ("train/loss", "test/loss", "test/accuracy", "broadcast_bits", "aggregated_bits", "clients_failed")
            values = ", ".join(f"{name} {metrics[name]:.6g}" for name in shown if name in metrics)
            log.info("fedq: round %d of %d: %s", state.round, run.rounds, values)
    log.info("fedq: output: %s", folder.resolve())


class Nodes:
    """Flower's nodes as the clients of a configuration.

    A node registers its client once: the number, examples and targets. The weight of a client follows from the
    registered numbers, never from a later claim.
    """

    def __init__(self, grid: Grid, process: FederatedAveraging, timeout: float) -> None:
        """Takes Flower's connection, the process whose rounds the nodes serve, and the seconds to wait for answers."""
        self._grid, self._protocol, self._timeout = grid, process.protocol, timeout
        self._lock = threading.Lock()  # Flower's grid is not safe for several threads
        self._clients: dict[int, tuple[int, Registered]] = {}  # client → its node and its numbers
        self._known: set[int] = set()

    def wait_for(self, count: int) -> None:
        """Returns when `count` clients are registered."""
        said = -1
        while (connected := self._register()) < count:
            if connected != said:
                log.info("fedq: %d of %d clients are connected", connected, count)
            said = connected
            time.sleep(1)

    def clients(self, attempt: int, numbers: Iterable[int]) -> list[Client]:
        """Returns the clients with the given numbers, after new nodes have registered."""
        self._register()
        unknown = 0, Registered(0, 0)
        return [Client(number, _elsewhere, self._clients.get(number, unknown)[1].examples) for number in numbers]

    def ask(
        self, client: Client, messages: list[bytes], received: Received, record: ClientRecord
    ) -> tuple[Answer, Registered]:
        """Sends messages to the node of a client and returns its answer; see `cohort.Ask`."""
        if client.number not in self._clients:
            raise ClientFailure("silent", f"no node is client {client.number}")
        node, registered = self._clients[client.number]
        content = RecordDict({"broadcast": packed({str(place): data for place, data in enumerate(messages)})})
        with timed(record.seconds, "train"):
            reply = self._reply(Message(content, node, MessageType.TRAIN))
        if reply is None:
            raise ClientFailure("silent", f"no answer came within {self._timeout:g} seconds")
        if reply.has_error():
            reason = (reply.error.reason or f"error {reply.error.code}").strip().partition("\n")[0]
            raise ClientFailure("silent" if reply.error.code in _GONE else "unable", reason)
        if failure := reply.content.config_records.get("failure"):
            reason, kind = str(failure.get("reason"))[:500], failure.get("kind")
            if failure.get("other_base") is True:
                raise OtherBase("lost", reason)
            raise ClientFailure(kind if kind in FAILURES else "refused", reason)
        if len(records := list(reply.content.array_records.values())) != 1:
            raise MessageError(f"an answer has one record of messages, this one has {len(records)}")
        answered = unpacked(records[0])
        report = answered.pop(REPORT, b"")
        record.bits, record.report_bits = 8 * sum(map(len, answered.values())), 8 * len(report)
        return Answer(list(answered.values()), report, {}), self._checked(registered, reply)

    def _checked(self, registered: Registered, reply: Message) -> Registered:
        """Returns the numbers of a client in a round. Raises MessageError if these numbers do not fit."""
        claimed = _numbers(reply, ("examples", "targets"))
        limit = self._protocol.training.max_examples
        if not limit or limit >= registered.examples:
            return registered
        if claimed is None or claimed[0] != limit or not 0 < claimed[1] <= registered.targets:
            raise MessageError(
                f"a client with {registered.examples} examples cannot use {claimed} examples and targets"
            )
        return Registered(*claimed)

    def _register(self) -> int:
        """Registers the clients of new nodes, and returns the number of clients that are connected."""
        connected = set(self._grid.get_node_ids())
        self._clients = {number: own for number, own in self._clients.items() if own[0] in connected}
        asked = [Message(RecordDict(), node, MessageType.QUERY) for node in sorted(connected - self._known)]
        for reply in self._grid.send_and_receive(asked, timeout=self._timeout) if asked else ():
            node = reply.metadata.src_node_id
            self._known.add(node)
            if (numbers := None if reply.has_error() else _numbers(reply, ("client", "examples", "targets"))) is None:
                reason = reply.error.reason if reply.has_error() else "the node sends no numbers"
                log.warning("fedq: node %d is left out: %s", node, reason)
                continue
            if numbers[0] in self._clients:  # a node that was started again has another number
                log.warning("fedq: node %d takes the place of another node as client %d", node, numbers[0])
            self._clients[numbers[0]] = node, Registered(*numbers[1:])
        return len(self._clients)

    def _reply(self, message: Message) -> Message | None:
        """Sends a message and waits for the reply; None if no reply comes in time."""
        deadline = time.monotonic() + self._timeout
        with self._lock:
            sent = list(self._grid.push_messages([message]))
        while time.monotonic() < deadline:
            with self._lock:
                for reply in self._grid.pull_messages(sent):
                    return reply
            time.sleep(0.2)
        return None


def _numbers(reply: Message, names: Sequence[str]) -> list[int] | None:
    """Returns the integers `names` of a reply's record `registered`; None unless all are from 0 to 2^62."""
    record = reply.content.metric_records.get("registered", MetricRecord())
    numbers = [record.get(name) for name in names]
    return [n for n in numbers if isinstance(n, int)] if all(_is_count(n) for n in numbers) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _elsewhere() -> NoReturn:
    raise FedqError("a client's examples are on its node")
