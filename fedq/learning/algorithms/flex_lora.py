"""FlexLoRA: the mean of the adapters' products, refactored by a truncated singular value decomposition."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding import MessageError
from fedq.encoding.numerics import is_finite
from fedq.encoding.schema import Tensors
from fedq.errors import FedqError
from fedq.learning.algorithm import FedAvg

_A, _B = ".lora_A.", ".lora_B."


@dataclass(frozen=True)
class FlexLoRA(FedAvg):
    """FlexLoRA (Bai 2024): the mean of clients' products B·A, in place of the product of the mean B and the mean A.

    Clients send A (rank, inputs) and B (outputs, rank) of each adapter. The server takes the weighted mean of B·A. The
    next B is U·Σ and the next A is Vᵀ, of the mean's largest singular values. No product of these ranks is nearer to
    the mean. Rows of A have norm 1, so that B can learn even where Σ is 0. All other tensors have a plain mean. The
    server optimizer steps towards the next A and B; server=sgd with server.lr=1 takes exactly these matrices.
    """

    @override
    def phases(self, parameters: Collection[str]) -> list[set[str]]:
        pairs(parameters)  # raises an error before the first round
        return super().phases(parameters)

    @override
    def to_sum(self, update: Tensors, received: Tensors) -> dict[str, Tensor]:
        result = dict(update)
        for a, b in pairs(update):
            result[b] = (received[b] + result[b]).float() @ (received[a] + result.pop(a)).float()
        return result

    @override
    def from_sum(self, sums: Tensors, weight: int, weights: Tensors) -> dict[str, Tensor]:
        result = dict(sums)
        for a, b in pairs(weights):
            rank, mean = len(weights[a]), sums[b] / weight
            if not is_finite(mean):
                raise MessageError(f"the sum of the products of {b!r} overflows {mean.dtype}")
            left, values, right = torch.linalg.svd(mean.double(), full_matrices=False)
            # a rank above the number of singular values leaves the last columns of B and rows of A as they are
            new_a, new_b = weights[a].double(), weights[b].double().clone()
            new_a = torch.cat((right[:rank], new_a[len(right) :]))
            new_b[:, : len(values)] = left[:, :rank] * values[:rank]
            new_b[:, len(values) :] = 0
            result[a], result[b] = (
                ((new - weights[name].double()) * weight).to(sums[b].dtype) for name, new in ((a, new_a), (b, new_b))
            )
        return result


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the names of A and B of each adapter. Raises FedqError if A or B is missing."""
    names = list(names)
    found = [(name.replace(_B, _A), name) for name in names if _B in name]
    expected = {name for pair in found for name in pair}
    if not found or expected != {name for name in names if _A in name or _B in name}:
        raise FedqError("algorithm: this algorithm needs a model whose LoRA adapters send both A and B")
    return found
