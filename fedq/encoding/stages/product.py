"""Product quantisation sends short vectors of elements as the index of their nearest centroid."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.numerics import exact_divide, largest_magnitude, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.errors import check_range
from fedq.keys import Key

_SAMPLE = 1 << 14  # vectors that the centroids are fitted to, at most
_CHUNK = 1 << 18  # distances taken at a time


@dataclass(frozen=True)
class ProductQuantization(EncodingStage):
    """Vectors of `dim` consecutive elements as one of 2^bits centroids (Jégou 2011; of networks Stock 2020).

    Takes a floating tensor of n elements; gives ⌊n / dim⌋ symbols: bits/dim bits an element. Side values are the
    centroids, at most as many as vectors, and the last n mod dim elements. The key chooses vectors as the first
    centroids. k-means then fits the centroids to all vectors, or to 16,384 random vectors if there are more. Every
    vector is compared with every centroid, so the stage is far slower than all others. Biased.

    dim: number of elements of a vector, 1 or more.
    bits: 1 to 12.
    iterations: number of iterations of k-means, 0 or more.
    """

    dim: int = 4
    bits: int = 8
    iterations: int = 10

    def __post_init__(self) -> None:
        check_range("dim", self.dim, 1, integer=True)
        check_range("bits", self.bits, 1, 12, integer=True)
        check_range("iterations", self.iterations, 0, integer=True)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The centroids and the last elements, in the tensor's own dtype."""
        working_dtype(self, spec)
        vectors, rest = divmod(spec.numel, self.dim)
        centroids = (min(vectors, 1 << self.bits), self.dim)
        return {"centroids": TensorSpec(centroids, spec.dtype), "rest": TensorSpec((rest,), spec.dtype)}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """A symbol for each vector."""
        return TensorSpec.symbols((spec.numel // self.dim,), max(1, len(side["centroids"])))

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        flat, n = x.reshape(-1), x.numel() // self.dim
        # in units of the largest magnitude: no square overflows
        vectors, unit = flat[: n * self.dim].view(n, self.dim), largest_magnitude(x) or 1.0
        sample = vectors
        if n > _SAMPLE:
            chosen = key.bits(_SAMPLE, 64) % np.uint64(n)
            sample = vectors[torch.from_numpy(chosen.view(np.int64)).to(x.device)]
        sample = exact_divide(sample.to(working_dtype(self, TensorSpec.of(x))), unit).float()
        first = torch.from_numpy(key.fold("first").permutation(len(sample))[: 1 << self.bits]).to(x.device)
        centroids = sample[first]
        for _ in range(self.iterations):
            symbols = _nearest(sample, centroids, 1.0)
            counts = torch.bincount(symbols, minlength=len(centroids))
            totals = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, symbols, sample.double())
            means = (totals / counts.clamp(min=1)[:, None]).float()
            centroids = torch.where(counts[:, None] > 0, means, centroids)
        rounded = centroids.double().mul_(unit).to(x.dtype)
        symbols = _nearest(vectors, centroids, unit).to(TensorSpec.symbols((), max(1, len(centroids))).dtype)
        return symbols, {"centroids": rounded.cpu(), "rest": flat[n * self.dim :].to("cpu", copy=True)}

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        vectors = side["centroids"].to(y.device).index_select(0, y.int()).view(-1)
        return torch.cat((vectors, side["rest"].to(y.device))).view(spec.shape)


def _nearest(vectors: Tensor, centroids: Tensor, unit: float) -> Tensor:
    """Returns the index of the centroid nearest to each of `vectors` / `unit` (int64)."""
    # the nearest has the largest ⟨v, c⟩ − ‖c‖²/2
    offsets, found = centroids.square().sum(1).mul_(-0.5), [torch.zeros(0, dtype=torch.int64, device=vectors.device)]
    if len(vectors) == 0:
        return found[0]
    for part in torch.split(vectors, _CHUNK // len(centroids)):
        scaled = exact_divide(part.to(torch.promote_types(part.dtype, torch.float32)), unit).float()
        scores = torch.addmm(offsets, scaled, centroids.t())
        # numpy takes an eighth of torch's time
        found.append(scores.argmax(1) if scores.is_cuda else torch.from_numpy(scores.numpy().argmax(1)))
    return torch.cat(found)
