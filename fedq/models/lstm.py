"""The recurrent language models of adaptive federated optimization.

The initial values follow the authors' code for Keras. PyTorch's defaults differ.
"""

import math

import torch
from torch import Tensor, nn


class OneBiasLSTM(nn.LSTM):
    """An LSTM layer with one bias, as in Keras. PyTorch adds two biases; here the second is a constant 0.

    At first, weights of the input are He-normal (He 2015), and weights of the state are orthogonal. Biases are 0, and 1
    for the forget gate.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__(inputs, units, batch_first=True)
        del self.bias_hh_l0
        self.register_buffer("bias_hh_l0", torch.zeros(4 * units), persistent=False)
        normal_(self.weight_ih_l0, 2 / inputs)
        nn.init.orthogonal_(self.weight_hh_l0)
        with torch.no_grad():  # four gates: input, forget, cell, output
            self.bias_ih_l0.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(units))


class CharLSTM(nn.Module):
    """The next-character model of Reddi et al. (2021): 820,522 parameters with 90 characters.

    embedding 8 – LSTM 256 – LSTM 256 – dense `num_classes`. The input is int64 (N, T) with ids below `num_classes`.
    The output is logits (N, T, num_classes).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 8)
        self.lstm1 = OneBiasLSTM(8, 256)
        self.lstm2 = OneBiasLSTM(256, 256)
        self.dense = nn.Linear(256, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of the token after each token of `x`."""
        x, _ = self.lstm1(self.embedding(x))
        x, _ = self.lstm2(x)
        logits: Tensor = self.dense(x)
        return logits


class WordLSTM(nn.Module):
    """The next-word model of Reddi et al. (2021): 4,050,748 parameters with 10,004 words.

    embedding 96 – LSTM 670 – dense 96 – dense `num_classes`. The input is int64 (N, T) with ids below `num_classes`.
    The output is logits (N, T, num_classes).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 96)
        self.lstm = OneBiasLSTM(96, 670)
        self.dense1 = nn.Linear(670, 96)
        self.dense2 = nn.Linear(96, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of the token after each token of `x`."""
        x, _ = self.lstm(self.embedding(x))
        logits: Tensor = self.dense2(self.dense1(x))
        return logits


def initialize(model: nn.Module) -> None:
    """Sets embeddings to uniform values, and dense layers to Glorot-normal weights and zero biases."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.uniform_(layer.weight, -0.05, 0.05)
        elif isinstance(layer, nn.Linear):
            normal_(layer.weight, 2 / (layer.in_features + layer.out_features))
            nn.init.zeros_(layer.bias)


def normal_(weight: Tensor, variance: float) -> None:
    """Draws `weight` from a normal distribution that is cut at two standard deviations and has the given variance."""
    std = math.sqrt(variance) / 0.87962566103423978  # the cut takes 23 % of the variance
    nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)
