"""The ClientApp of a fedq configuration: the client's half of a round, on Flower's nodes."""

from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from omegaconf import DictConfig, OmegaConf

from fedq.config import ConfigError, build, build_protocol, build_run, check
from fedq.data import FederatedDataset
from fedq.encoding import EncodeError, Key, MessageError
from fedq.encoding import message as frame
from fedq.encoding.schema import Schema, Tensors, schema_of
from fedq.errors import FedqError
from fedq.integrations.flower.records import packed, refusal, unpacked
from fedq.learning.aggregation import one_thread
from fedq.learning.client import ClientHalf
from fedq.learning.failures import ClientFailure, OtherBase, SharedDraw
from fedq.learning.local_training import loaded
from fedq.learning.protocol import EXACT, Protocol
from fedq.learning.round import PHASES, Answer, Received
from fedq.simulation.run import own_device

REPORT = "report"
"""The name of a report beside the messages "0", "1", … of an answer."""

_KEPT, _HELD, _BASE = "fedq.kept", "fedq.held", "fedq.base"


def client_app(configuration: Path) -> ClientApp:
    """Returns the ClientApp of a configuration that `python -m fedq.integrations.flower new` wrote.

    A node is the client whose number is its `partition-id`. Flower's simulation sets this key; on a SuperNode it is a
    part of `--node-config`. What a client keeps between rounds is in the node's state.
    """
    app = ClientApp()

    @app.query()
    def register(message: Message, context: Context) -> Message:
        """Answers with the client's number, and the numbers of its examples and targets."""
        try:
            half, dataset = _half(configuration)
            number = _number(context, dataset)
            examples = loaded(number, dataset.client(number).load, half.protocol.device)
        except (FedqError, ClientFailure) as error:
            return refusal(error, message)
        targets = half.protocol.task.count(examples.y)
        registered = MetricRecord({"client": number, "examples": len(examples.y), "targets": targets})
        return Message(RecordDict({"registered": registered}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Answers a broadcast with the client's update, or with the reason of a failure."""
        try:
            return Message(_answered(configuration, message, context), reply_to=message)
        except ClientFailure as failure:
            kind, reason = failure.kind, str(failure)
            base = isinstance(failure, OtherBase)
        except (EncodeError, MessageError) as error:
            kind, reason, base = "unable", str(error), False
        except FedqError as error:
            return refusal(error, message)
        failed = ConfigRecord({"kind": kind, "reason": reason, "other_base": base})
        return Message(RecordDict({"failure": failed}), reply_to=message)

    return app


def configuration_of(path: Path) -> DictConfig:
    """Returns the checked configuration in a YAML file. Raises FedqError if it is wrong."""
    cfg = OmegaConf.load(path)
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path} holds no configuration of fedq")
    check(cfg)
    return cfg


@lru_cache(maxsize=1)
def _half(configuration: Path) -> tuple[ClientHalf, FederatedDataset]:
    """Returns the client's half and the dataset of a configuration. Raises FedqError for a wrong configuration."""
    cfg = configuration_of(configuration)
    run, dataset = build_run(cfg), build(cfg, "dataset")
    return ClientHalf(Protocol(**build_protocol(cfg, dataset, own_device(run.device))), run.precision), dataset


def _number(context: Context, dataset: FederatedDataset) -> int:
    """Returns the number of the node's client. Raises FedqError for a node without a number."""
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < dataset.num_clients:
        raise FedqError(
            f"the node's partition-id must be from 0 to {dataset.num_clients - 1}, not {number}: start the SuperNode "
            'with --node-config "partition-id=0"'
        )
    return number


@one_thread()
def _answered(configuration: Path, message: Message, context: Context) -> RecordDict:
    """Returns the content of the answer to a broadcast, and keeps the client's state in the node's state.

    Raises ClientFailure, FedqError or EncodeError if there is no answer.
    """
    half, dataset = _half(configuration)
    protocol, number = half.protocol, _number(context, dataset)
    if len(records := list(message.content.array_records.values())) != 1:
        raise MessageError(f"a broadcast has one record of messages, this one has {len(records)}")
    received = _received(protocol, list(unpacked(records[0]).values()), context, number)
    key = Key(protocol.seed, received.attempt, number)
    examples = loaded(number, dataset.client(number).load, protocol.device)
    kept = _loaded(context, _KEPT, protocol.kept_schema)
    seconds = dict.fromkeys(PHASES, 0.0)
    try:
        answer = half.answer(received, number, examples, kept, seconds)
    except SharedDraw:  # this model is the first in the process that draws random numbers
        if half.keyed:
            raise
        half.keyed = True
        answer = half.answer(received, number, examples, kept, seconds)
    _keep(protocol, context, received, answer)
    messages = {str(place): data for place, data in enumerate(answer.messages)} | {REPORT: answer.report}
    numbers = protocol.registered(examples, key)
    registered = MetricRecord({"examples": numbers.examples, "targets": numbers.targets})
    return RecordDict({"answer": packed(messages), "registered": registered})


def _received(protocol: Protocol, messages: list[bytes], context: Context, number: int) -> Received:
    """Returns what the client decodes. The node keeps a base that the server sends."""
    if protocol.begins_with_base(messages):
        context.state[_BASE] = packed({_BASE: messages[0]})
    elif _BASE in context.state:
        messages = [*unpacked(context.state.array_records[_BASE]).values(), *messages]
    schema = protocol.exact.schema if protocol.follows else {}
    held = [tensors for i in range(2) if (tensors := _loaded(context, f"{_HELD}.{i}", schema))]
    client = {"client": number} if protocol.submodels else {}
    return protocol.receive(messages, held, **client)


def _keep(protocol: Protocol, context: Context, received: Received, answer: Answer) -> None:
    """Writes the client's state to the node's state, as exact messages of fedq: Flower's arrays have fewer dtypes."""
    states = {_KEPT: answer.to_keep}
    if protocol.follows:
        parts = (received.weights, received.reference)  # the first reference has the frozen tensors, too
        states |= {f"{_HELD}.{i}": {name: part[name] for name in protocol.exact.schema} for i, part in enumerate(parts)}
    for name, tensors in states.items():
        if tensors:
            data = EXACT.bind(schema_of(tensors)).encode(tensors, Key(protocol.seed)).message
            context.state[name] = packed({name: data})


def _loaded(context: Context, name: str, schema: Schema) -> Tensors:
    """Returns the tensors of `schema` that the node keeps under `name`; empty if there are none."""
    if not schema or name not in context.state.array_records:
        return {}
    (data,) = unpacked(context.state.array_records[name]).values()
    return EXACT.bind(schema).decode(data, frame.peek(data)[1]).tensors
