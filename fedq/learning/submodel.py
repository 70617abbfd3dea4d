"""Federated dropout: each client trains a part of the model."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedq.errors import FedqError
from fedq.keys import Key
from fedq.learning.local_training import channels_last

Units = Mapping[str, Tensor]
"""Of each group of units, the sorted numbers (int64) of those in a sub-model."""


@dataclass(frozen=True)
class FederatedDropout:
    """Each client of each round receives, trains and sends a random sub-model (Caldas 2018, §3.2).

    Of each group of a model's units (the outputs of a dense layer, the filters of a convolution) a sub-model has
    round(keep · units), at least one. So all have the same shapes, and one schema; which units, follows from the
    client's key of the round and costs no bytes. The server averages each coordinate over those who had it.

    Weights are sent as they are: a sub-model computes exactly what the whole does with the other units at 0, and an
    update means the same to both. Dropout as Srivastava (2014) has it scales by `keep`, so that a unit receives as much
    in the whole as in a sub-model. Without, the whole's logits come out too large: that costs it no accuracy, but its
    loss is higher (experiments/dropout). Momentum on the server moves coordinates that nobody had, as their last steps
    did; without it they stay.
    """

    keep: float

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, not {self.keep}")


class SubModels:
    """The sub-models of one model, and the way from its tensors to theirs and back.

    The model's attribute `units` names each group with the axes of parameters and buffers that belong to its units:
    {"conv2": (("conv2.weight", 0), ("conv2.bias", 0), ("dense1.weight", 1))}. The first axis has one place a unit;
    others may have several, one behind the other. Layers must compute from their parameters' shapes, as nn.Linear and
    ungrouped nn.Conv2d do. Raises FedqError for a model without such a declaration or with one that does not fit.
    """

    def __init__(self, model: nn.Module, submodel: FederatedDropout) -> None:
        groups, name_of_model = getattr(model, "units", None), type(model).__name__
        if not groups:
            raise FedqError(
                f"run.submodel: {name_of_model} cannot be trained in parts: it does not say, in an attribute `units`, "
                "which axes of its parameters belong to which units"
            )
        tensors = model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._device = next(iter(tensors.values())).device
        self._sizes: dict[str, tuple[int, int]] = {}  # group → its units, those of them in a sub-model
        self._axes: dict[str, dict[int, str]] = {name: {} for name in tensors}  # tensor → axis → group
        for group, places in groups.items():
            size = 0
            for name, axis in places:
                shape = self._shapes.get(name, ())
                size = size or (shape[axis] if 0 <= axis < len(shape) else 0)
                if not (size and 0 <= axis < len(shape) and shape[axis] % size == 0):
                    raise FedqError(
                        f"run.submodel: units[{group!r}] of {name_of_model}: {name!r} has no such axis {axis}"
                    )
                self._axes[name][axis] = group
            self._sizes[group] = size, max(1, round(submodel.keep * size))

    def drawn(self, key: Key) -> Units:
        """Returns the units of the sub-model of a client in a round."""
        return {
            group: torch.from_numpy(key.fold("dropout").fold(group).permutation(size)[:kept]).sort()[0].to(self._device)
            for group, (size, kept) in self._sizes.items()
        }

    def cut(self, tensors: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
        """Returns the part of the model's tensors that is a sub-model's; what is not cut is handed through."""
        parts = {}
        for name, part in tensors.items():
            for axis, group in self._axes[name].items():
                size, _ = self._sizes[group]
                part = torch.unflatten(part, axis, (size, -1)).index_select(axis, units[group]).flatten(axis, axis + 1)
            parts[name] = part
        return parts

    def whole(self, parts: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
        """The inverse of `cut`, with zeros where a sub-model has nothing."""
        tensors = {}
        for name, tensor in parts.items():
            for axis, group in self._axes[name].items():
                size, kept = self._sizes[group]
                part = torch.unflatten(tensor, axis, (kept, -1))
                zeros = part.new_zeros((*part.shape[:axis], size, *part.shape[axis + 1 :]))
                tensor = zeros.index_copy_(axis, units[group], part).flatten(axis, axis + 1)
            tensors[name] = tensor
        return tensors

    def weights(self, cohort: Iterable[tuple[Key, int]]) -> dict[str, Tensor]:
        """Returns, for each coordinate of the model's tensors, the sum of the weights of those clients who had it.

        Clients come as their keys of the round and weights. The sums are int64, in shapes that broadcast to the
        tensors'; where nobody had a coordinate it is 1, by which a sum of nothing can be divided.
        """
        totals = {name: torch.tensor(0, device=self._device) for name in self._axes}
        for key, weight in cohort:
            held = {}
            for group, units in self.drawn(key).items():
                held[group] = torch.zeros(self._sizes[group][0], dtype=torch.int64, device=self._device)
                held[group][units] = 1
            for name, axes in self._axes.items():
                own = torch.tensor(weight, device=self._device)
                for axis, group in axes.items():
                    own = own * held[group].reshape(-1, *[1] * (len(self._shapes[name]) - axis - 1))
                totals[name] = totals[name] + own
        for name, axes in self._axes.items():
            for axis, group in axes.items():
                places = self._shapes[name][axis] // self._sizes[group][0]
                totals[name] = totals[name].repeat_interleave(places, axis - len(self._shapes[name]))
        return {name: total.clamp(min=1) for name, total in totals.items()}

    def model(self, model: nn.Module) -> nn.Module:
        """Returns a copy of the model in the shapes of its sub-models."""
        copy = deepcopy(model)
        first = {group: torch.arange(kept, device=self._device) for group, (_, kept) in self._sizes.items()}
        for name, part in self.cut(copy.state_dict(), first).items():
            owner, _, own = name.rpartition(".")
            module = copy.get_submodule(owner)
            whole = getattr(module, own)
            setattr(module, own, nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part)
        return channels_last(copy)
