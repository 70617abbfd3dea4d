"""Models: nn.Modules from examples to logits."""

from fedq.models.fedavg_cnn import FedAvgCNN
from fedq.models.lstm import CharLSTM, WordLSTM
from fedq.models.mlp import MLP
from fedq.models.resnet import ResNet
from fedq.models.transformer import Transformer

__all__ = ["MLP", "CharLSTM", "FedAvgCNN", "ResNet", "Transformer", "WordLSTM"]
