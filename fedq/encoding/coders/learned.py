"""Entropy coders whose model was agreed before: the frequencies that the last round's clients saw.

The message itself has no table. What the model costs instead, for L levels: L bytes down, the weights, and 2 L bytes
up, each client's report; a table in the message has about L bytes for a smooth distribution, and fewer the fewer
symbols occur. So a learned model does not save bytes while every client reports in every round; it is here for
comparison, and for what reports seldom.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.adaptive import StateUpdate
from fedq.encoding.coders import ans, huffman, models
from fedq.encoding.coders import tokens as shared
from fedq.encoding.coders.coder import AdaptiveCoder, Buffer
from fedq.encoding.schema import Tensors, TensorSpec

_WEIGHTS = (16 + np.arange(256) % 16) << np.arange(256) // 16  # what the 256 values of a byte stand for: 16 to 31 · 2¹⁵


@dataclass(frozen=True)
class _Learned(AdaptiveCoder):
    """What the learned coders share: clients report the shares of the symbols, the server sends weights.

    bits: 1 to 12; the symbols have at most 2^bits levels. The first round takes all symbols to be equally likely; a
    symbol that did not occur keeps a weight of 2⁻¹⁶ of the most frequent one's.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 12:
            raise ValueError(f"bits must be from 1 to 12, not {self.bits}")

    def initial_state(self, spec: TensorSpec) -> Tensors:
        """As Adaptive.initial_state: the shares, all alike."""
        return {"shares": torch.ones(1 << self.bits)}

    def params(self, state: Tensors) -> Tensors:
        """As Adaptive.params: a byte for each symbol, of 4 bits of exponent and 4 of fraction."""
        shares = state["shares"].double().numpy()
        codes = np.searchsorted(_WEIGHTS, shares / shares.max() * _WEIGHTS[-1], side="right") - 1
        return {"weights": torch.from_numpy(np.maximum(codes, 0).astype(np.uint8))}

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        """As Adaptive.update_spec: what share of the symbols each is, in 11 bits of precision."""
        return {"shares": StateUpdate(TensorSpec((1 << self.bits,), torch.float16), "sum")}

    def update_state(self, state: Tensors, aggregated: Tensors) -> Tensors:
        """As Adaptive.update_state: the sum over the last cohort, if there was anything to count."""
        # whatever clients report, shares are none below 0, nor a sum of both infinities
        shares = aggregated["shares"].float().nan_to_num().clamp(0, torch.finfo(torch.float16).max)
        return {"shares": shares} if bool(shares.any()) else dict(state)

    def encode(self, symbols: Tensor, spec: TensorSpec, params: Tensors) -> tuple[Buffer, Tensors]:
        """As AdaptiveCoder.encode."""
        self._check(spec)
        if not spec.numel:
            return b"", {"shares": torch.zeros(1 << self.bits, dtype=torch.float16)}
        _, tokens, _ = shared.tokenise(symbols, spec)
        shares = torch.zeros(1 << self.bits, dtype=torch.float16)
        shares[: spec.levels] = torch.from_numpy(shared.histogram(tokens, spec) / len(tokens))
        return self._write(tokens, _weights(params)), {"shares": shares}

    def decode(self, data: memoryview, spec: TensorSpec, params: Tensors) -> Tensor:
        """As AdaptiveCoder.decode."""
        self._check(spec)
        tokens = shared.empty(spec)
        if len(tokens):
            data = self._read(data, tokens, _weights(params))
            if spec.levels is not None and int(tokens.max()) >= spec.levels:
                raise ValueError(f"a symbol is not from 0 to {spec.levels - 1}")
        return shared.detokenise(0, tokens, data, spec)

    def _check(self, spec: TensorSpec) -> None:
        if spec.levels is None or spec.levels > 1 << self.bits:
            raise ValueError(f"{type(self).__name__} is for symbols of {self.bits} bits, not of {spec.levels} levels")

    @abstractmethod
    def _write(self, tokens: np.ndarray, weights: np.ndarray) -> bytes:
        """Returns the stream of tokens."""

    @abstractmethod
    def _read(self, data: memoryview, tokens: np.ndarray, weights: np.ndarray) -> memoryview:
        """Fills `tokens`; returns what is behind their stream."""


@dataclass(frozen=True)
class LearnedANS(_Learned):
    """rANS, as ANS, with the frequencies of the last round's symbols.

    bits: 1 to 12; the symbols have at most 2^bits levels.
    """

    def _write(self, tokens: np.ndarray, weights: np.ndarray) -> bytes:
        return b"".join(ans.push([(tokens, shared.normalise(weights, models.BITS))], models.BITS))

    def _read(self, data: memoryview, tokens: np.ndarray, weights: np.ndarray) -> memoryview:
        stream = ans.Stream(data)
        stream.pop(tokens, shared.normalise(weights, models.BITS), models.BITS)
        return stream.close()


@dataclass(frozen=True)
class LearnedHuffman(_Learned):
    """Canonical Huffman codes, as Huffman, of the last round's frequencies: static tables that both sides hold.

    bits: 1 to 12; the symbols have at most 2^bits levels.
    """

    def _write(self, tokens: np.ndarray, weights: np.ndarray) -> bytes:
        return huffman.write(tokens, self._lengths(weights))

    def _read(self, data: memoryview, tokens: np.ndarray, weights: np.ndarray) -> memoryview:
        return huffman.read(data, self._lengths(weights), huffman.longest(len(weights)), tokens)

    def _lengths(self, weights: np.ndarray) -> np.ndarray:
        return huffman.code_lengths(weights, huffman.longest(len(weights))) + 1


def _weights(params: Tensors) -> np.ndarray:
    weights: np.ndarray = _WEIGHTS[params["weights"].cpu().numpy()]
    return weights
