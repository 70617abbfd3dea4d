"""BlazeFL: its thread pool and its server of federated averaging."""

import threading
from importlib.metadata import version
from typing import Any

import torch
from blazefl.contrib.fedavg import FedAvgBaseServerHandler, FedAvgUplinkPackage
from blazefl.core import ThreadPoolClientTrainer

from experiments.peers.contestant import CLIENTS, EXAMPLES, WORKERS, Rounds, make_data, make_model, train
from fedq.models import FedAvgCNN


class Models:
    """Makes the server's model, in PyTorch's default layout, which BlazeFL's flat messages need."""

    def select_model(self, name: str) -> FedAvgCNN:
        """Returns a new model; there is only one kind."""
        return FedAvgCNN(10)


class Trainer(ThreadPoolClientTrainer):  # type: ignore[misc] # the package has no types here
    """Keeps one model a thread. The package's own example makes a new model for each client."""

    def __init__(self) -> None:
        self.num_parallels, self.device = WORKERS, "cpu"
        self.cache: list[Any] = []
        self.stop_event = threading.Event()
        self._idle = [make_model() for _ in range(WORKERS)]
        self._data = make_data()

    def worker(self, cid: int, device: str, payload: Any, stop_event: threading.Event) -> Any:
        """Returns the trained weights of client `cid` as one flat tensor."""
        # BlazeFL starts new threads every round; the models stay
        model = self._idle.pop()
        parameters = list(model.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        with torch.no_grad():
            for parameter, values in zip(parameters, payload.model_parameters.split(sizes), strict=True):
                parameter.copy_(values.view(parameter.shape))
        steps, loss = train(model, *self._data[cid])
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self._idle.append(model)
        return FedAvgUplinkPackage(cid, flat, EXAMPLES, {"steps": steps, "loss": loss})


def main() -> None:
    """Runs rounds until standard input ends."""
    torch.set_num_threads(1)
    rounds = Rounds(version("blazefl"))
    server = FedAvgBaseServerHandler(Models(), "", None, 1_000_000, CLIENTS, 1.0, "cpu", 0, 0)
    trainer = Trainer()
    more = rounds.boundary(server.model.parameters())
    while more:
        trainer.local_process(server.downlink_package(), server.sample_clients())
        packages, trainer.cache = trainer.cache, []
        for package in packages:
            server.load(package)
        steps = sum(package.metadata["steps"] for package in packages)
        loss = sum(package.metadata["loss"] for package in packages) / CLIENTS
        more = rounds.boundary(server.model.parameters(), steps, loss)
