"""The inputs of the battery: tensors of many shapes, dtypes and sizes."""

import math

import torch
from torch import Tensor


def wave(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns different values in (−1, 1), the same on every machine."""
    n = math.prod(shape)
    return ((torch.arange(n, dtype=torch.float64) * 0.6180339887498949) % 2 - 1).reshape(shape).to(dtype)


def floating_inputs() -> dict[str, Tensor]:
    """Returns finite floating tensors, which every chain takes."""
    f64 = torch.float64
    return {
        "zeros": torch.zeros(3, 4),
        "minus zero": torch.full((5,), -0.0),
        "constant": torch.full((50,), 0.1),
        "negative constant": torch.full((50,), -0.1),
        "one element": torch.tensor([-2.5]),
        "0-d": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "empty matrix": torch.zeros(3, 0, 2),
        "two values": torch.tensor([-1.0, 3.0]),
        "vector": wave(1001),
        "transposed": wave(7, 5).t(),
        "every third": wave(90)[::3],
        "one of a column": wave(3, 2)[1:2, 1],
        "none of a column": wave(3, 2)[3:, 1],
        "expanded": wave(5).expand(4, 5),
        "channels last": wave(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "float16": wave(101, dtype=torch.float16),
        "float16 at its limits": torch.tensor([-65504.0, 0.0, 6e-8, 65504.0], dtype=torch.float16),
        "bfloat16": wave(101, dtype=torch.bfloat16),
        "float64": wave(101, dtype=f64),
        "far from zero": 1e6 + wave(101),
        "huge": torch.tensor([-3e38, 1.0, 3e38]),
        "float32's maximum": torch.tensor([torch.finfo(torch.float32).min, torch.finfo(torch.float32).max]),
        "huge bfloat16": torch.tensor([-3e38, 1.0, 3e38], dtype=torch.bfloat16),
        "huge float64": torch.tensor([0.0, 1.0, 1e308], dtype=f64),
        "float64's maximum": torch.tensor([0.0, 3e307, torch.finfo(f64).max], dtype=f64),
        "denormal": wave(101) * 1e-40,
        "denormal float16": torch.arange(9, dtype=torch.float16) * 6e-8,
        "denormal float64": wave(101, dtype=f64) * 1e-309,
        "the smallest": torch.tensor([0.0, 5e-324, 1e-323], dtype=f64),
    }


def large_input() -> Tensor:
    """Returns a tensor larger than the pieces that most stages work on."""
    return wave(2**18 + 5)


def largest_input() -> Tensor:
    """Returns 2,200,000 elements, at least twice the piece that any stage or coder works on."""
    return wave(1100, 2000)


def exact_inputs() -> dict[str, Tensor]:
    """Returns integer and boolean tensors, which every chain sends exact."""
    return {
        "int64 0-d": torch.tensor(2**62 + 1),
        "int64": torch.arange(-500, 501) * (2**53 + 1),
        "int32": torch.arange(-50, 51, dtype=torch.int32),
        "int16 transposed": torch.arange(24, dtype=torch.int16).reshape(4, 6).t(),
        "uint8": torch.arange(256).to(torch.uint8),
        "bool": torch.arange(101) % 3 == 0,
        "bool 0-d": torch.tensor(True),
        "one int64 of a column": torch.arange(6).reshape(3, 2)[1:2, 1],
        "no int64": torch.zeros(0, 3, dtype=torch.int64),
    }


def refused_inputs() -> dict[str, Tensor]:
    """Returns floating tensors that every chain refuses."""
    bad = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
    inputs = {name: torch.tensor([0.0, value, 1.0]) for name, value in bad.items()}
    inputs |= {f"{name} alone": torch.tensor(value) for name, value in bad.items()}
    inputs |= {f"{name} in float16": torch.tensor([1.0, value], dtype=torch.float16) for name, value in bad.items()}
    return inputs | {"both infinities": torch.tensor([math.inf, -math.inf], dtype=torch.float64)}
