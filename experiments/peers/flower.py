"""Flower's simulation: FedAvg and the Message API, Ray workers with one core each.

Ray's workers import this module. It must not run as __main__, which would be pickled with every message.
"""

import logging
from functools import cache
from importlib.metadata import version
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.peers.contestant import CLIENTS, EXAMPLES, Rounds, make_data, make_model, train

# made once in each worker
worker_model, worker_data = cache(make_model), cache(make_data)


def train_client(message: Any, context: Any) -> Any:
    """Answers the server's weights with the trained ones."""
    model = worker_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    steps, loss = train(model, *worker_data()[context.node_config["partition-id"]])
    metrics = MetricRecord({"num-examples": EXAMPLES, "steps": steps, "loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


def make_client() -> Any:
    """Returns the application that Ray's workers run."""
    app = ClientApp()
    app.train()(train_client)
    return app


def main() -> None:
    """Runs rounds until standard input ends."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    rounds = Rounds(f"{version('flwr')}, ray {version('ray')}")
    steps, loss = 0, 0.0

    def total(replies: list[Any], key: str) -> Any:
        nonlocal steps, loss
        records = [reply["metrics"] for reply in replies]
        steps = sum(record["steps"] for record in records)
        loss = sum(record["loss"] for record in records) / len(records)
        return MetricRecord({})

    def between_rounds(number: int, arrays: Any) -> None:
        if not rounds.boundary(arrays.to_torch_state_dict().values(), steps, loss):
            raise SystemExit

    def serve(grid: Any, context: Any) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS, train_metrics_aggr_fn=total)
        initial = ArrayRecord(make_model().state_dict())
        # evaluate_fn is called before the first round and after each
        strategy.start(grid, initial, num_rounds=1_000_000, evaluate_fn=between_rounds)

    server = ServerApp()
    server.main()(serve)
    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, make_client(), num_supernodes=CLIENTS, backend_config=resources)
