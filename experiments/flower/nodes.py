"""Flower's nodes in this process: a Grid that passes each message to a ClientApp, and returns the reply."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor
from typing_extensions import override

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # a ServerApp's process sets them


def travelled(message: Message) -> Message:
    """Returns the message as the other side receives it: Flower's bytes, read again."""
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    other = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(other, Message)
    return other


Network = Callable[[Message], Message | None]
"""Changes a message in either direction, or loses it (None)."""


class Nodes(Grid):
    """Nodes with the numbers 1000, 1001, …, each with a ClientApp. The server has the number 1.

    network: What happens to messages on their way.
    errors: The reasons in all error replies of nodes.
    """

    def __init__(self, apps: Iterable[ClientApp], network: Network = lambda message: message) -> None:
        self.apps: dict[int, tuple[ClientApp, Context]] = {}
        self.network = network
        self.errors: list[str] = []
        self._replies: list[Message | None] = []
        for place, app in enumerate(apps):
            self.connect(app, place)

    def connect(self, app: ClientApp, place: int) -> int:
        """Adds a node with the partition-id `place`, and returns its number."""
        node = 1000 + len(self.apps)
        self.apps[node] = app, Context(1, node, {"partition-id": place}, RecordDict(), {})
        return node

    @override
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            names.append(str(len(self._replies)))
            self._replies.append(None)
            node = message.metadata.dst_node_id
            arrived = self.network(travelled(message))
            if arrived is None:
                continue
            app, context = self.apps[node]
            try:
                reply = app(arrived, context)
            except Exception as error:  # Flower's own process of an app does the same
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=arrived)
            if reply.has_error():
                self.errors.append(reply.error.reason or "")
            self._replies[int(names[-1])] = self.network(travelled(reply))
        return names

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = [self._replies[int(name)] for name in message_ids]
        return [reply for reply in replies if reply is not None]

    @override
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    @override
    def get_node_ids(self) -> list[int]:
        return list(self.apps)

    @override
    def set_run(self, run: Any) -> None: ...

    @property
    @override
    def run(self) -> Any: ...

    @override
    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError  # Flower's strategies build their messages without the grid


class Net(torch.nn.Module):
    """A layer whose weight is compressed, with a batch norm whose counter is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = torch.nn.Linear(300, 40), torch.nn.BatchNorm1d(40)


def first_weights() -> ArrayRecord:
    """Returns the first weights of `Net`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ArrayRecord(Net().state_dict())


Seen = list[dict[str, Tensor]]


def app_of(shift: float, mods: Sequence[Mod], seen: Seen | None = None, examples: int = 1) -> ClientApp:
    """Returns an app that adds normal numbers times `shift` to the weights, and counts a batch.

    `seen` gets the weights that the app receives.
    """
    app = ClientApp(mods=list(mods))
    seen = [] if seen is None else seen

    @app.train()
    def train(message: Message, context: Context) -> Message:
        tensors = message.content.array_records["arrays"].to_torch_state_dict()
        seen.append({name: value.clone() for name, value in tensors.items()})
        draw = np.random.default_rng([context.node_id, len(seen)])
        for name, value in tensors.items():
            noise = torch.from_numpy(draw.standard_normal(value.shape))
            tensors[name] = value + (shift * noise).to(value.dtype) if value.is_floating_point() else value + 1
        metrics = MetricRecord({"train_loss": 1.0 / len(seen), "num-examples": examples})
        return Message(RecordDict({"arrays": ArrayRecord(dict(tensors)), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        tensors = message.content.array_records["arrays"].to_torch_state_dict()
        metrics = MetricRecord({"norm": float(tensors["dense.weight"].norm()), "num-examples": examples})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def array_of(data: bytes) -> Array:
    """Returns the array of a message of fedq."""
    return Array("uint8", (len(data),), "fedq.message", data)
