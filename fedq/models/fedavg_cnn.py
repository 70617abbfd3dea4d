"""The CNN of Federated Averaging."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fedq.models.glorot import glorot_uniform_


class FedAvgCNN(nn.Module):
    """The convolutional network of McMahan et al. (2016), §3: 1,663,370 parameters with 10 classes.

    conv 5×5×32 – pool – conv 5×5×64 – pool – dense 512 – dense `num_classes`, `same` padding, ReLU. The input is
    float32 (N, 1, 28, 28), the output logits (N, num_classes). The model has no softmax layer, because cross entropy is
    more exact on logits. The argmax of the logits is the class, and their softmax gives probabilities.
    """

    # fedq.learning.submodel reads this; a filter of conv2 feeds 7 × 7 columns of dense1.weight
    units: ClassVar = {
        "conv1": (("conv1.weight", 0), ("conv1.bias", 0), ("conv2.weight", 1)),
        "conv2": (("conv2.weight", 0), ("conv2.bias", 0), ("dense1.weight", 1)),
        "dense1": (("dense1.weight", 0), ("dense1.bias", 0), ("dense2.weight", 1)),
    }

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.dense1 = nn.Linear(64 * 7 * 7, 512)
        self.dense2 = nn.Linear(512, num_classes)
        glorot_uniform_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images `x`."""
        # max and ReLU commute, and after pooling ReLU has a quarter of the elements
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        logits: Tensor = self.dense2(F.relu(self.dense1(x.flatten(1))))
        return logits
