"""Which tensor of a state_dict gets which encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from fedq.encoding.codec import JOINT, Codec, EncodeError
from fedq.encoding.encoder import Encoder
from fedq.encoding.rate_control import RateController
from fedq.encoding.schema import Schema, TensorSpec
from fedq.errors import check_choice, check_range

Reference = Literal["none", "initial", "last"]
"""The tensors to subtract before encoding: none, the initial weights, or the weights that a client received last."""

_EXACT = Encoder()


@dataclass(frozen=True)
class StateDictEncoder:
    """Encodes a state_dict into one message, tensor by tensor. `bind` gives the codec of one schema.

    Floating tensors of more than `threshold` elements pass `encoder`. All others, and every integer or boolean tensor,
    travel exact in their own dtype.

    encoder: The encoder of large floating tensors.
    threshold: The number of elements up to which tensors travel exact.
    rules: An encoder for each shell pattern of tensor names. The first pattern that matches overrides `encoder` and
        `threshold`.
    joint: Whether the tensors for `encoder` are encoded as one vector, in the schema's order. Top-k then chooses among
        the elements of all tensors.
    reference: The tensors to subtract before encoding: "none", "initial" or "last". Both sides hold them.
    common_scale: Whether to divide the compressed tensors by their common root mean square, one value a message.
        Absolute steps are then equal in all tensors. So bits go where they reduce the squared error most ("equal
        slope", Shoham and Gersho 1988).
    rate_control: Multiplies the common scale by a factor that follows earlier rounds.
    """

    encoder: Encoder = _EXACT
    threshold: int = 10_000
    rules: Mapping[str, Encoder] = field(default_factory=dict)
    joint: bool = False
    reference: Reference = "none"
    common_scale: bool = False
    rate_control: RateController | None = None

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, integer=True)
        check_choice("reference", self.reference, Reference)
        if self.rate_control is not None and not isinstance(self.rate_control, RateController):
            raise TypeError(f"{self.rate_control!r} is not a rate controller")
        if self.rate_control and not self.common_scale:
            raise ValueError("common_scale must be true for rate_control, which multiplies the common scale")

    def bind(self, schema: Schema, attached: Schema | None = None, reports: bool = False, *, prefix: str = "") -> Codec:
        """Returns the codec of state_dicts of `schema`.

        attached: The specs of tensors that travel exact, in front of the payloads.
        reports: Whether the reports to adaptive parts travel too, after the attached tensors.
        prefix: Stands before the names of the joint vector and of rate control, which differ between codecs that way.

        Raises EncodeError if tensors of different dtypes are to be joined.
        """
        by_rule = {name: self._rule_for(name) for name in schema}
        large = [name for name, spec in schema.items() if not by_rule[name] and self._is_large(spec)]
        joined = large if self.joint else []
        dtypes = {schema[name].dtype for name in joined}
        if len(dtypes) > 1:
            raise EncodeError(f"tensors of different dtypes cannot be joined: {sorted(map(str, dtypes))}")
        chains = {}
        for name, spec in schema.items():
            encoder = by_rule[name] or (self.encoder if name in large else _EXACT)
            if name in joined:
                name, spec = prefix + JOINT, TensorSpec((sum(schema[n].numel for n in joined),), spec.dtype)
            if name not in chains:
                # clients' common scales differ, so their payloads cannot be added up before they are decoded
                chains[name] = encoder.bind(spec, name, summable=not self.common_scale)
        return Codec(
            schema,
            chains,
            joined,
            attached=attached or {},
            reports=reports,
            reference=self.reference,
            common_scale=self.common_scale,
            rate_control=self.rate_control,
            prefix=prefix,
        )

    def idle_rules(self, schema: Schema) -> list[str]:
        """Returns the patterns that decide for no tensor: none matches, or an earlier pattern matches first."""
        first = {next((p for p in self.rules if fnmatchcase(name, p)), None) for name in schema}
        return [pattern for pattern in self.rules if pattern not in first]

    def _rule_for(self, name: str) -> Encoder | None:
        return next((encoder for pattern, encoder in self.rules.items() if fnmatchcase(name, pattern)), None)

    def _is_large(self, spec: TensorSpec) -> bool:
        # no stage works in float8
        return spec.dtype.is_floating_point and spec.dtype.itemsize > 1 and spec.numel > self.threshold
