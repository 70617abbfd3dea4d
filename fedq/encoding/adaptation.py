"""State, params and reports of a codec's adaptive parts, each as one flat dict of tensors."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fedq.encoding.adaptive import Adaptive, StateUpdate
from fedq.encoding.schema import Tensors, TensorSpec, schema_of

T = TypeVar("T")

_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "stack": lambda left, right: torch.cat((left, right)),
}


class Adaptation:
    """The adaptive parts of a codec.

    parts: Each part by its path `tensor/place`, with the spec of the tensor that enters its chain.

    State, params and reports name each tensor `tensor/place/name`: the encoded tensor, the place of the part in its
    chain, and the part's own name. Messages and checkpoints hold them in this form.
    """

    def __init__(self, parts: Mapping[str, tuple[Adaptive, TensorSpec]]) -> None:
        """Raises TypeError if state, params or reports have a name with a slash, or a value that is no tensor."""
        self.parts = parts
        self._updates: dict[str, StateUpdate] = {}
        for path, (part, spec) in parts.items():
            self._updates |= _joined(path, part.update_spec(spec))
        self.params_schema = schema_of(self.params(self.initial_state()))
        self.report_schema = {path: update.spec for path, update in self._updates.items()}

    def initial_state(self) -> dict[str, Tensor]:
        """Returns the state before the first round."""
        state: dict[str, Tensor] = {}
        for path, (part, spec) in self.parts.items():
            state |= _tensors(f"{type(part).__name__}.initial_state", path, part.initial_state(spec))
        return state

    def params(self, state: Tensors) -> dict[str, Tensor]:
        """Returns this round's params, which encode and decode take."""
        params: dict[str, Tensor] = {}
        states = by_part(state)
        for path, (part, _) in self.parts.items():
            params |= _tensors(f"{type(part).__name__}.params", path, part.params(states.get(path, {})))
        return params

    def as_cohort(self, report: Tensors) -> dict[str, Tensor]:
        """Returns one client's report in the form that `combine` takes."""
        stacked = {path for path, update in self._updates.items() if update.aggregation == "stack"}
        return {path: value[None] if path in stacked else value for path, value in report.items()}

    def combine(self, left: Tensors, right: Tensors) -> dict[str, Tensor]:
        """Combines the reports of two cohorts."""
        return {path: _COMBINE[update.aggregation](left[path], right[path]) for path, update in self._updates.items()}

    def update_state(self, state: Tensors, reports: Tensors) -> dict[str, Tensor]:
        """Returns the state after a round, from the combined reports of a cohort of at least one client."""
        after: dict[str, Tensor] = {}
        states, combined = by_part(state), by_part(reports)
        for path, (part, _) in self.parts.items():
            own = part.update_state(states.get(path, {}), combined.get(path, {}))
            after |= _tensors(f"{type(part).__name__}.update_state", path, own)
        return after


def by_part(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each adaptive part, by the part's path and the tensor's own name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        path, _, name = full_name.rpartition("/")
        parts.setdefault(path, {})[name] = value
    return parts


def _tensors(who: str, path: str, values: Tensors) -> dict[str, Tensor]:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{who} gives {name!r} as a {type(value).__name__}, not as a tensor")
    return _joined(path, values)


def _joined(path: str, values: Mapping[str, T]) -> dict[str, T]:
    if slashed := [name for name in values if "/" in name]:
        raise TypeError(f"names of state, params and reports must have no '/', unlike {slashed[0]!r}")
    return {f"{path}/{name}": value for name, value in values.items()}
