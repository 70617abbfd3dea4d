"""pfl: its simulated backend in one process, with as many intra-op threads as other contestants have workers."""

from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from experiments.peers.contestant import BATCH, CLIENTS, EXAMPLES, RATE, WORKERS, Rounds, make_data
from fedq.models import FedAvgCNN


class Model(FedAvgCNN):
    """The model with the two methods that pfl asks for; counts its steps."""

    steps, last_loss = 0, torch.zeros(())

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross entropy."""
        loss = F.cross_entropy(self(x), y)
        self.steps, self.last_loss = self.steps + 1, loss.detach()
        return loss

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Returns nothing: no round is evaluated."""
        return {}


class BetweenRounds:
    """A callback of pfl that waits for a request before each round."""

    def __init__(self) -> None:
        self._rounds = Rounds(version("pfl"))

    def on_train_begin(self, *, model: Any) -> Any:
        """Waits before the first round."""
        self._rounds.boundary(model.pytorch_model.parameters())
        return Metrics()

    def after_central_iteration(self, metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Any]:
        """Waits after a round; stops the training if no other round follows."""
        network = model.pytorch_model
        steps, network.steps = network.steps, 0
        return not self._rounds.boundary(network.parameters(), steps, float(network.last_loss)), Metrics()

    def on_train_end(self, *, model: Any) -> None:
        """Has nothing to do."""


def main() -> None:
    """Runs rounds until standard input ends."""
    torch.set_num_threads(WORKERS)
    between = BetweenRounds()
    data = make_data()

    def shuffled(client: int) -> Any:
        order = torch.randperm(EXAMPLES)
        return PyTorchTensorDataset(tuple(values[order] for values in data[client]), user_id=str(client))

    network = Model(10).to(memory_format=torch.channels_last)
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    clients = FederatedDataset(shuffled, MinimizeReuseUserSampler(range(CLIENTS)))
    FederatedAveraging().run(
        # round 0 would be evaluated whatever the frequency; it is not, because there is nothing to evaluate on
        NNAlgorithmParams(1_000_000, 1_000_000, CLIENTS, None),
        SimulatedBackend(clients, clients, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=RATE),
        callbacks=[between],
    )
