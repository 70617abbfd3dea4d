"""The small network of Federated Averaging."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fedq.models.glorot import glorot_uniform_


class MLP(nn.Module):
    """The "2NN" of McMahan et al. (2016), §3: two hidden layers of 200 units, 199,210 parameters with 10 classes.

    The input is float32 (N, 1, 28, 28), the output logits (N, num_classes).
    """

    units: ClassVar = {  # for fedq.learning.submodel
        "dense1": (("dense1.weight", 0), ("dense1.bias", 0), ("dense2.weight", 1)),
        "dense2": (("dense2.weight", 0), ("dense2.bias", 0), ("dense3.weight", 1)),
    }

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(28 * 28, 200)
        self.dense2 = nn.Linear(200, 200)
        self.dense3 = nn.Linear(200, num_classes)
        glorot_uniform_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images `x`."""
        x = F.relu(self.dense1(x.flatten(1)))
        logits: Tensor = self.dense3(F.relu(self.dense2(x)))
        return logits
