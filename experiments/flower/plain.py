"""A Flower app on handwritten digits, plain and with compression(): accuracy, and bytes by Flower's own count."""

import argparse
import logging
import random
from collections.abc import Callable
from statistics import mean, stdev

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp.strategy import FedAvg, Strategy
from rich.table import Table

from experiments.flower.nodes import Nodes
from experiments.tables import show
from fedq.data.mnist5k import Mnist5k
from fedq.encoding import Encoder, FixedWidth, StateDictEncoder, UniformQuantization
from fedq.integrations.flower import Compressed, compression
from fedq.models import FedAvgCNN

UINT8 = StateDictEncoder(Encoder([UniformQuantization(bits=8)], FixedWidth()))
NODES, BATCH, RATE = 3, 50, 0.1


def app_of(dataset: Mnist5k, seed: int, steps: int, compressed: bool, count: Callable[[Message], None]) -> ClientApp:
    """Returns an app that trains the CNN; `count` sees each message as it is on the network."""

    def counting(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        count(message)
        reply = call_next(message, context)
        count(reply)
        return reply

    app = ClientApp(mods=[counting, compression()] if compressed else [counting])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, number = FedAvgCNN(num_classes=10), int(context.node_config["partition-id"])
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        examples, optimizer = dataset.client(number).load(), torch.optim.SGD(model.parameters(), lr=RATE)
        server_round = int(str(message.content.config_records["config"]["server-round"]))
        draw = torch.Generator().manual_seed(1000 * (100 * seed + number) + server_round)
        order = torch.randperm(len(examples.y), generator=draw)[: steps * BATCH]
        for batch in torch.split(order, BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(examples.x[batch]), examples.y[batch])
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives no types here
            optimizer.step()
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(examples.y)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def trained(dataset: Mnist5k, seed: int, rounds: int, steps: int, compressed: bool) -> tuple[float, int]:
    """Returns the test accuracy and the bytes of all messages' records, by Flower's `count_bytes`."""
    counted = [0]

    def count(message: Message) -> None:
        counted[0] += sum(record.count_bytes() for record in message.content.values())

    random.seed(seed)
    torch.manual_seed(seed)
    model = FedAvgCNN(num_classes=10)
    grid = Nodes(app_of(dataset, seed, steps, compressed, count) for _ in range(NODES))
    strategy: Strategy = FedAvg(fraction_evaluate=0.0)
    if compressed:
        strategy = Compressed(strategy, broadcast=UINT8, upload=UINT8, seed=seed)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)
    assert not grid.errors, grid.errors
    model.load_state_dict(result.arrays.to_torch_state_dict())
    test = dataset.test()
    with torch.no_grad():
        return float((model(test.x).argmax(1) == test.y).double().mean()), counted[0]


def main() -> None:
    """Prints accuracies and bytes of both apps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="steps of a node in a round")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    dataset, table = Mnist5k(clients=NODES), Table("app", "accuracy, %", "of each seed", "bytes", "times fewer")
    plain = 0
    for name, compressed in (("FedAvg", False), ("Compressed(FedAvg), 8 bits", True)):
        runs = [trained(dataset, s, arguments.rounds, arguments.steps, compressed) for s in range(arguments.seeds)]
        accuracies, size = [100 * accuracy for accuracy, _ in runs], runs[0][1]
        plain = plain or size
        spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        table.add_row(name, f"{mean(accuracies):.2f}{spread}", each, f"{size:,}", f"{plain / size:.2f}")
    show(table)


if __name__ == "__main__":
    main()
