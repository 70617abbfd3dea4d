"""Trellis-coded quantisation: two coarse quantisers take turns, and together have the error of a finer one."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedq.encoding.coders.coder import checked
from fedq.encoding.coders.tokens import kernels
from fedq.encoding.numerics import exact_divide, largest_magnitude, saturate, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.step import of_rms
from fedq.keys import Key

_KERNELS = "stages._kernels"
_MOST = 1 << 30  # symbols
_CODES = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10)}  # Ungerboeck 1982, table I
_SEARCHES = 3


@dataclass(frozen=True)
class TrellisQuantization(EncodingStage):
    """Rounds to the values of two quantisers, of which one is in use: which one, follows from the symbols before.

    Takes a floating tensor of any shape; gives integers from 0 on (int32 of the same shape, no levels), for an entropy
    coder: ANS, or CABAC(signed=False). Trellis-coded quantisation (Marcellin & Fischer 1990) with an entropy coder
    (Fischer & Wang 1992, Marcellin 1994), the idea of dependent quantisation in VVC and ISO/IEC 15938-17. For the
    symbols 0, 1, 2, 3, …, one quantiser has the values ¼, −¾, 1¼, −1¾, … in steps, the other their negatives. So no
    symbol needs a sign, 0 is near 0 in both, and both have the same law: a coder need not know of them. A machine of
    `states` states, moved on by each symbol and put back every 1,024, tells which is in use. Of all sequences the one
    with the least error and bits is sent (Viterbi 1967).

    step: in units of the tensor's root mean square if `relative` (then the product is a side value), else in its own.
        It makes about as many bits as the same step of StepQuantization.
    states: 4, 8, 16 or 32. Twice as many save 0.06 dB, or 0.01 bits an element.
    rate_weight: the sum of (error in steps)² + rate_weight · bits is made least. The bits are those of a law, 0 or
        not, and if not geometric, for each of 64 classes, told by row and column as in CABAC; it takes three searches.

    Two side values move what is decoded, for 0 and for all other symbols, to the mean of its elements.

    In real bytes of CABAC or ANS, on a normal source, the squared error at 1, 2 and 3 bits is 0.279, 0.070 and 0.0176
    of the variance with 8 states, 0.271, 0.068 and 0.0171 with 32. The best scalar quantiser has 0.348, 0.0889 and
    0.0222, Shannon's bound is 0.25, 0.0625 and 0.0156. A search takes 82 million elements a second of one core with 32
    states, 122 with 8; all of it, with ANS, 18 and 24. Raises ValueError for magnitudes of more than 2^28 steps.
    """

    step: float
    states: int = 32
    relative: bool = True
    rate_weight: float = 0.1

    def __post_init__(self) -> None:
        if not 1e-37 <= self.step < math.inf:
            raise ValueError(f"step must be from 1e-37 and finite, not {self.step}")
        if self.states not in _CODES:
            raise ValueError(f"states must be 4, 8, 16 or 32, not {self.states}")
        if not 0 <= self.rate_weight <= 1e6:
            raise ValueError(f"rate_weight must be from 0 to a million, not {self.rate_weight}")

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The step, if relative, in float64 for a float64 tensor, else float32; the centroids in float32."""
        step = {"step": TensorSpec((), working_dtype(self, spec))}
        return (step if self.relative else {}) | {name: TensorSpec((), torch.float32) for name in ("zero", "shift")}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Integers of the same shape."""
        if self.relative and not float(side["step"]) > 0:
            raise ValueError(f"the step is {float(side['step'])}")
        if not max(abs(float(side["zero"])), abs(float(side["shift"]))) <= 1:
            raise ValueError(f"the centroids are {float(side['zero'])} and {float(side['shift'])} steps off")
        return TensorSpec(spec.shape, torch.int32)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """As EncodingStage.encode."""
        spec, peak, side = TensorSpec.of(x), largest_magnitude(x), {}
        work, step = working_dtype(self, spec), self.step
        if self.relative:
            side["step"] = of_rms(step, x, peak, work)
            step = float(side["step"])
        if peak > _MOST // 4 * step:
            raise ValueError(f"{peak} is more than 2^28 steps of {step}")
        halves = exact_divide(x.reshape(-1).to(work), step).mul_(2).cpu().numpy()
        symbols = np.floor(np.abs(halves)).astype(np.int32)
        classes, centroids, subsets = np.empty(len(halves), np.uint8), np.zeros(2), _subsets(self.states)
        for _ in range(_SEARCHES):
            counts = kernels(_KERNELS).trellis_classes(symbols.reshape(spec.matrix), classes.reshape(spec.matrix))
            costs = (4 * self.rate_weight * _bits(counts)).astype(np.float32)
            number, excess = kernels(_KERNELS).trellis_search(halves, classes, costs, centroids, subsets, symbols)
            centroids = (excess / number.clip(1)).clip(-2, 2)
        side |= {
            name: torch.tensor(c / 2, dtype=torch.float32) for name, c in zip(("zero", "shift"), centroids, strict=True)
        }
        return torch.from_numpy(symbols).view(x.shape).to(x.device), side

    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """As EncodingStage.decode."""
        symbols = y.reshape(-1).cpu()
        checked(symbols, 0, _MOST)
        work = working_dtype(self, spec)
        signs = np.empty(len(symbols), np.int8)
        kernels(_KERNELS).trellis_signs(symbols.numpy(), _steps(self.states), signs)
        value = symbols.to(work).div_(2).add_(0.25)
        value += torch.where(symbols == 0, side["zero"].to(work), side["shift"].to(work))
        step = min(float(side["step"]) if self.relative else self.step, torch.finfo(work).max)
        value.mul_(torch.from_numpy(signs)).mul_(step)
        return saturate(value, spec.dtype).view(spec.shape).to(y.device)


def _parity(number: int) -> int:
    return number.bit_count() % 2


def _subsets(states: int) -> np.ndarray:
    """Returns m mod 4 of the values (m + ½) / 2 of the branch from state t // 2 to t, by t.

    The last bits that went in, of which the state holds all but the newest, tell both bits of m.
    """
    high, low = _CODES[states]
    return np.array([2 * _parity(t & high) + _parity(t & low) for t in range(states)])


def _steps(states: int) -> np.ndarray:
    """Returns twice the next state, and 1 more for a minus, by state and symbol mod 4."""
    high, low = _CODES[states]
    table = np.empty((states, 4), np.int64)
    for state in range(states):
        for symbol in range(4):
            minus = (symbol + _parity(2 * state & low)) % 2
            m = -symbol - 1 if minus else symbol
            bit = (m >> 1 & 1) ^ _parity(2 * state & high)
            table[state, symbol] = 2 * ((2 * state + bit) % states) + minus
    return table


def _bits(counts: np.ndarray) -> np.ndarray:
    """Returns what a symbol above 0 costs in bits more than a 0, and what each 1 in it costs, by class."""
    mean = 2.0 ** (np.arange(len(counts)) / 2 - 15.75)
    # as if eight symbols more had been seen, of a geometric law
    number, some, total = counts.T + 8 * np.stack((np.ones(len(counts)), mean / (1 + mean), mean))
    beyond = np.maximum(total / some - 1, 2.0**-10)
    return np.stack((np.log2((number - some) / some * beyond), np.log2(1 + 1 / beyond)))
