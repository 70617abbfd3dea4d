"""The interface of a federated dataset: a population of clients, each with its own examples, and a test set."""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedq.errors import FedqError
from fedq.keys import BROADCAST


class Examples(NamedTuple):
    """Inputs of a model and their labels.

    Attributes:
        x: inputs, shape (N, …), of any dtype that the model takes. Images: float32, (N, 1, 28, 28), values in [0, 1].
        y: class of each input, int64, shape (N,).
    """

    x: Tensor
    y: Tensor


def pooled(parts: Iterable[Examples]) -> Examples:
    """Returns the examples of several clients as one set. Raises FedqError if their shapes or dtypes differ."""
    x, y = zip(*parts, strict=True)
    for name, tensors in (("inputs", x), ("targets", y)):
        found = sorted({f"{tuple(tensor.shape[1:])} {tensor.dtype}".replace("torch.", "") for tensor in tensors})
        if len(found) > 1:
            raise FedqError(
                f"the {name} of clients are {found[0]} and {found[1]}: all clients need one shape and one dtype."
            )
    return Examples(torch.cat(x), torch.cat(y))


def plain_integer(name: str, value: Any, least: int, below: int) -> int:
    """Returns `value`, an integer of Python, numpy or torch, as an int; `name` is for the error.

    Raises FedqError if `value` is no integer, or is not from `least` to `below` − 1.
    """
    try:
        number = int(operator.index(value))
    except TypeError:
        raise FedqError(f"{name} must be an integer, not {value!r}.") from None
    if not least <= number < below:
        raise FedqError(f"{name} must be from {least} to {below - 1}, not {number}.")
    return number


@dataclass(frozen=True)
class Client:
    """One client of a population. Integers of numpy and torch become ints. Values of other types raise FedqError.

    Attributes:
        number: the client's number in the population, 0 to 2^64 − 2. The client's random draws depend on the number.
        load: reads the examples, the same at each call, from any thread. An OSError or FedqError of `load` ends the
            run.
        examples: number of examples, 0 if unknown. Ranks and workers balance their work by this number.
        validation: reads the client's validation examples; None for a client without validation examples.
        test: reads the client's test examples; None for a client without test examples.
    """

    number: int
    load: Callable[[], Examples]
    examples: int = 0
    validation: Callable[[], Examples] | None = None
    test: Callable[[], Examples] | None = None

    def __post_init__(self) -> None:
        for name in ("load", "validation", "test"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name == "load"):
                raise FedqError(
                    f"a client's {name} must be a function that returns Examples, such as lambda: examples, not a "
                    f"{type(value).__name__}."
                )
        for name, below in (("number", BROADCAST), ("examples", 2**63)):
            plain = plain_integer(f"a client's {name}", getattr(self, name), 0, below)
            object.__setattr__(self, name, plain)


class FederatedDataset(Protocol):
    """A population of clients, numbered from 0, and a test set. A client's examples are read when they are needed."""

    num_classes: int
    num_clients: int

    def client(self, number: int) -> Client:
        """Returns client `number`, without reading its examples."""
        ...

    def test(self) -> Examples:
        """Returns the test set of the whole population."""
        ...
