"""The initialisation of Keras."""

from torch import nn


def glorot_uniform_(module: nn.Module) -> None:
    """Sets convolutions and dense layers to Glorot-uniform weights (Glorot 2010, eq. 16) and zero biases, like Keras.

    PyTorch's default differs, and changes the first ten rounds of training.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
