"""Models: nn.Modules from float32 images (N, 1, 28, 28) to logits (N, classes)."""

from fedq.models.fedavg_cnn import FedAvgCNN
from fedq.models.mlp import MLP

__all__ = ["MLP", "FedAvgCNN"]
