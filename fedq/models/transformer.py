"""A small language model with attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """A causal decoder (Vaswani 2017) with norms first (Radford 2019): 804,864 parameters with 90 tokens.

    Input and output share the embeddings. A rotation of queries and keys encodes the tokens' places (RoPE, Su 2021), so
    that sequences may have any length. Dropout is on embeddings, attention weights, and both branches of a block. The
    input is int64 (N, T) with ids below `num_classes`. The output is logits (N, T, num_classes).

    num_classes: Number of tokens in the vocabulary.
    layers: Number of blocks.
    width: Size of an embedding; 4 × width is the size of the hidden layers.
    heads: Number of attention heads; width / heads must be even.
    dropout: Share of values that training sets to 0.
    """

    def __init__(
        self, num_classes: int, layers: int = 4, width: int = 128, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise ValueError(f"width / heads must be an even number, not {width} / {heads}")
        self.size = width // heads
        self.embedding = nn.Embedding(num_classes, width)  # also the weights of the last layer
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # Radford 2019: smaller weights, because 2 × layers results are added
                added = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of the token after each token of `x`."""
        turns = rotations(x.shape[1], self.size, x.device)
        x = self.dropout(self.embedding(x))
        for block in self.blocks:
            x = block(x, turns)
        return F.linear(self.norm(x), self.embedding.weight)


class Block(nn.Module):
    """Attention and a hidden layer. Each has a norm first, and is added to the input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1 = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Returns (N, T, width) for `x` of (N, T, width) and the `rotations` of T places."""
        n, length, width = x.shape
        joint = self.attention_in(self.norm1(x)).view(n, length, 3, self.heads, self.size)
        joint = joint.permute(2, 0, 3, 1, 4)  # queries, keys and values (N, heads, T, size)
        query, key = rotated(joint[:2], turns)
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, joint[2], dropout_p=dropout, is_causal=True)
        x = x + self.dropout(self.attention_out(y.transpose(1, 2).reshape(n, length, width)))
        x = x + self.dropout(self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)))))
        return x


def rotations(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (length, size) of the angles place · 10000^(−2i / size), each for two elements."""
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angles = torch.outer(torch.arange(length, device=device), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Returns `x` (…, T, size) with elements i and i + size / 2 turned by their angle (Su 2021, §3.2.2)."""
    cosines, sines = turns
    first, second = x.chunk(2, -1)
    return (x * cosines + torch.cat((-second, first), -1) * sines).to(x.dtype)
