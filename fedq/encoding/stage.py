"""The two interfaces that an author of a compression scheme implements."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from fedq.encoding.adaptive import Adaptive
from fedq.encoding.coders import Coder
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.keys import Key


class Stage:
    """What both kinds of stage declare.

    A stage is a frozen dataclass. Both sides must agree on its arguments.

    A stage may claim to be `lossless` or `unbiased`, or that it `commutes_with_sum`. Write `unbiased = True` in the
    class, or a property if the claim depends on the arguments. `fedq.encoding.testing.check_stage` tests each claim.

    side_coders: The coders of side values of symbols, such as a mask, by name. All other side values travel exact.
    """

    side_coders: ClassVar[Mapping[str, Coder]] = MappingProxyType({})

    @property
    def lossless(self) -> bool:
        """Whether decode(encode(x)) == x."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether the mean of decode(encode(x)) over keys is x."""
        return False

    @property
    def commutes_with_sum(self) -> bool:
        """Whether decode(encode(x) + encode(y)) == decode(encode(x)) + decode(encode(y)).

        The keys of x and y differ in the client only. Such a stage has no side values.
        """
        return False

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Returns the specs of the side values for an input of `spec`. A message holds side values in this order.

        Raises ValueError if the stage cannot encode tensors of `spec`.
        """
        return {}

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Returns the spec of the encoded tensor for an input of `spec`. Its shape may depend on `side`.

        The receiver reads `side` from a message. Raise ValueError for values that `encode` never makes.
        """
        return spec


class EncodingStage(Stage, ABC):
    """One step of a chain: a pure function from a tensor to a smaller tensor, and back.

    `encode` uses the input, the key and the stage's arguments, and nothing else. `decode` uses the encoded tensor, the
    side values, the spec of the original, the key and the stage's arguments.
    """

    @abstractmethod
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """Returns the encoded tensor and its side values.

        x: A finite tensor of any shape. Do not write to it.
        key: The key of the stage's random draws.

        Raises ValueError for values that the stage cannot encode.
        """

    @abstractmethod
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """Returns a tensor of `spec` that is near the original.

        y: The encoded tensor.
        side: The side values.
        spec: The spec of the original.
        key: The key of `encode`.

        Raises ValueError for values that `encode` never makes.
        """


class AdaptiveEncodingStage(Stage, Adaptive):
    """An encoding stage with state on the server that learns over the rounds; see Adaptive."""

    @abstractmethod
    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """Returns the encoded tensor, its side values, and the report (`update_spec`). `params` are this round's."""

    @abstractmethod
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        """Returns a tensor of `spec` that is near the original; see EncodingStage.decode. `params` are this round's."""
