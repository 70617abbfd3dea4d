"""Trellis-coded quantisation: two coarse quantisers alternate, and have the error of a finer one."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedq.encoding.coders.coder import checked
from fedq.encoding.numerics import exact_divide, largest_magnitude, saturate, working_dtype
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.encoding.stage import EncodingStage
from fedq.encoding.stages.step import of_rms
from fedq.errors import check_choice, check_range
from fedq.keys import Key

_MOST = 1 << 30  # symbols
_CODES = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10)}  # Ungerboeck 1982, table I
_SEARCHES = 3


@dataclass(frozen=True)
class TrellisQuantization(EncodingStage):
    """Rounds to the values of two quantisers. Earlier symbols choose the quantiser (Marcellin and Fischer 1990).

    Takes a floating tensor of any shape; gives integers from 0 (int32 of the same shape, no levels), for an entropy
    coder (Fischer and Wang 1992, Marcellin 1994): ANS, or CABAC(signed=False). Dependent quantisation in VVC and
    ISO/IEC 15938-17 has the same idea. For the symbols 0, 1, 2, 3, …, one quantiser has the values ¼, −¾, 1¼, −1¾, … in
    steps, the other has their negatives. So no symbol needs a sign, and 0 is near 0 in both. Both have the same
    distribution, so the coder does not need the quantiser. A machine with `states` states chooses the quantiser. Each
    symbol moves the machine, and every 1,024 symbols it starts again. The sequence with the least error and bits is
    sent (Viterbi 1967). Two side values move the decoded values, for 0 and for all other symbols, to the mean of their
    elements. `encode` raises ValueError for magnitudes of more than 2^28 steps.

    On a normal source, with CABAC or ANS, the squared error at 1, 2 and 3 bits is 0.279, 0.070 and 0.0176 of the
    variance with 8 states. With 32 states it is 0.271, 0.068 and 0.0171. The best scalar quantiser has 0.348, 0.0889
    and 0.0222; Shannon's bound is 0.25, 0.0625 and 0.0156. One core searches 82 million elements a second with 32
    states, 122 million with 8. The whole stage with ANS takes 18 and 24 million elements a second.

    step: from 1e-37. StepQuantization with the same step takes about as many bits.
    states: 4, 8, 16 or 32. Twice as many save 0.06 dB, or 0.01 bits an element.
    relative: True: the step is in units of the tensor's root mean square, and their product is a side value. False: the
        step is in the tensor's unit.
    rate_weight: from 0 to 1e6: the stage minimises the sum of (error in steps)² + rate_weight · bits. In each of 64
        classes, chosen by row and column as in CABAC, symbols count as 0 or geometric. Three searches find the bits.
    """

    step: float
    states: int = 32
    relative: bool = True
    rate_weight: float = 0.1

    def __post_init__(self) -> None:
        check_range("step", self.step, 1e-37)
        check_choice("states", self.states, Literal[4, 8, 16, 32])
        check_range("rate_weight", self.rate_weight, 0, 1e6)

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The step, if relative (float64 for a float64 tensor, else float32), and the centroids (float32)."""
        step = {"step": TensorSpec((), working_dtype(self, spec))}
        return (step if self.relative else {}) | {name: TensorSpec((), torch.float32) for name in ("zero", "shift")}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Integers of the same shape."""
        if self.relative and not float(side["step"]) > 0:
            raise ValueError(f"the step is {float(side['step'])}")
        if not max(abs(float(side["zero"])), abs(float(side["shift"]))) <= 1:
            raise ValueError(f"the centroids are {float(side['zero'])} and {float(side['shift'])} steps off")
        return TensorSpec(spec.shape, torch.int32)

    @override
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        from fedq.encoding.stages.trellis_loops import trellis_classes, trellis_search

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
            counts = trellis_classes(symbols.reshape(spec.matrix), classes.reshape(spec.matrix))
            costs = (4 * self.rate_weight * _bits(counts)).astype(np.float32)
            number, excess = trellis_search(halves, classes, costs, centroids, subsets, symbols)
            centroids = (excess / number.clip(1)).clip(-2, 2)
        side |= {
            name: torch.tensor(c / 2, dtype=torch.float32) for name, c in zip(("zero", "shift"), centroids, strict=True)
        }
        return torch.from_numpy(symbols).view(x.shape).to(x.device), side

    @override
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        from fedq.encoding.stages.trellis_loops import trellis_signs

        symbols = y.reshape(-1).cpu()
        checked(symbols, 0, _MOST)
        work = working_dtype(self, spec)
        signs = np.empty(len(symbols), np.int8)
        trellis_signs(symbols.numpy(), _steps(self.states), signs)
        value = symbols.to(work).div_(2).add_(0.25)
        value += torch.where(symbols == 0, side["zero"].to(work), side["shift"].to(work))
        step = min(float(side["step"]) if self.relative else self.step, torch.finfo(work).max)
        value.mul_(torch.from_numpy(signs)).mul_(step)
        return saturate(value, spec.dtype).view(spec.shape).to(y.device)


def _parity(number: int) -> int:
    return number.bit_count() % 2


def _subsets(states: int) -> np.ndarray:
    """Returns, for each state t, m mod 4 of the values (m + ½) / 2 on the branch from state t // 2 to t.

    Both bits of m follow from the machine's last input bits. A state holds all input bits except the newest.
    """
    high, low = _CODES[states]
    return np.array([2 * _parity(t & high) + _parity(t & low) for t in range(states)])


def _steps(states: int) -> np.ndarray:
    """Returns a table by state and symbol mod 4: twice the next state, plus 1 for a minus."""
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
    """Returns for each class the bits that a symbol above 0 costs more than a 0, and the bits of each unit."""
    mean = 2.0 ** (np.arange(len(counts)) / 2 - 15.75)
    # adds eight symbols of a geometric law
    number, some, total = counts.T + 8 * np.stack((np.ones(len(counts)), mean / (1 + mean), mean))
    beyond = np.maximum(total / some - 1, 2.0**-10)
    return np.stack((np.log2((number - some) / some * beyond), np.log2(1 + 1 / beyond)))
