"""The two interfaces that an author of a compression scheme implements."""

from abc import ABC, abstractmethod

from torch import Tensor

from fedq.encoding.adaptive import Adaptive
from fedq.encoding.coders import Coder, Raw
from fedq.encoding.schema import Tensors, TensorSpec
from fedq.keys import Key


class Stage:
    """What both kinds of stage declare. Make a stage a frozen dataclass.

    Its constructor's arguments become part of the schema that both sides must agree on.

    A stage says what it can do, as `unbiased = True` in its class, or as a property where it depends on the arguments.
    Each claim is tested.
    """

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

        With keys that differ at most in the client, and no side values.
        """
        return False

    def side_spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Returns the specs of the side values for an input of `spec`; they travel exact, in this order.

        Raises ValueError for a `spec` that the stage does not take.
        """
        return {}

    def side_coder(self, name: str) -> Coder:
        """Returns the coder of a side value: exact as it is, unless it is a stream of symbols, such as a mask."""
        return Raw()

    def encoded_spec(self, spec: TensorSpec, side: Tensors) -> TensorSpec:
        """Returns the spec of what `encode` makes of an input of `spec`; its length may depend on `side`.

        On the receiving side `side` comes from the wire: raise ValueError for values that `encode` never makes.
        """
        return spec


class EncodingStage(Stage, ABC):
    """One step of a chain: a pure function from a tensor to a smaller one, and back.

    All a stage may use beside its input is its constructor's arguments and the key. `decode` sees only what
    travelled (`y` and `side`), the agreed `spec` of the original, and the key.
    """

    @abstractmethod
    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, Tensors]:
        """Returns the encoded tensor and its side values. `x` is finite and must not be changed.

        Raises ValueError for values that the stage cannot encode.
        """

    @abstractmethod
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key) -> Tensor:
        """Returns the approximation of the `x` of `spec` that `encode` was given.

        Raises ValueError for values that `encode` never makes.
        """


class AdaptiveEncodingStage(Stage, Adaptive):
    """An encoding stage that learns over the rounds from state which the server keeps (see Adaptive)."""

    @abstractmethod
    def encode(self, x: Tensor, key: Key, params: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """Returns the encoded tensor, its side values, and the state-update tensors."""

    @abstractmethod
    def decode(self, y: Tensor, side: Tensors, spec: TensorSpec, key: Key, params: Tensors) -> Tensor:
        """As EncodingStage.decode, with this round's params."""
