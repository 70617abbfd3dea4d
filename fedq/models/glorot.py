"""Keras' initialisation."""

from torch import nn


def glorot_uniform_(module: nn.Module) -> None:
    """Gives convolutions and dense layers Glorot-uniform weights (Glorot 2010, eq. 16) and zero biases, as Keras has.

    PyTorch's own default is another one, and the first ten rounds show it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
