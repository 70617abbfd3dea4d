"""Federated dropout: each client trains a part of the model."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedq.errors import FedqError, check_range
from fedq.keys import Key
from fedq.learning.local_training import channels_last

Units = Mapping[str, Tensor]
"""For each group, the sorted numbers (int64) of the units in a sub-model."""


@dataclass(frozen=True)
class FederatedDropout:
    """Each client of each round receives, trains and sends a random sub-model (Caldas 2018, §3.2).

    Units are the outputs of a dense layer or the filters of a convolution. A sub-model has round(keep · units) of each
    group of units, at least one. All sub-models therefore have equal shapes, and share one schema. The client's key of
    the round chooses the units, which costs no bytes. The server averages each coordinate over the clients whose
    sub-models hold the coordinate.

    Weights are sent unscaled: a sub-model computes what the full model computes if the other units are 0. Dropout
    (Srivastava 2014) scales by `keep` instead, so that a unit's input has the same size in both. Without the scale the
    full model's logits are too large. Its accuracy is the same, but its loss is higher (experiments/submodel).

    A coordinate that no client held keeps its value. But momentum on the server moves it on.

    keep: The share of the units that a sub-model has, above 0 and at most 1.
    """

    keep: float

    def __post_init__(self) -> None:
        check_range("keep", self.keep, above=0, high=1)


class SubModels:
    """The sub-models of one model: cuts the model's tensors to a sub-model's, and back.

    The model declares its units in an attribute `units`. For each group of units, `units` lists the axes of parameters
    and buffers that belong to the group:

        units = {"conv2": (("conv2.weight", 0), ("conv2.bias", 0), ("dense1.weight", 1))}

    The first axis has one place for each unit. Another axis may have several places in a row for each unit, as after
    nn.Flatten. Layers must compute from the shapes of their parameters, as nn.Linear and ungrouped nn.Conv2d do.
    """

    def __init__(self, model: nn.Module, submodel: FederatedDropout) -> None:
        """Raises FedqError if the model has no `units`, or if they do not fit its tensors."""
        groups, name_of_model = getattr(model, "units", None), type(model).__name__
        if not groups:
            raise FedqError(
                f"run.submodel: {name_of_model} cannot be trained in parts: it has no attribute `units`, which "
                "lists the axes of parameters that belong to each group of units"
            )
        tensors = model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._device = next(iter(tensors.values())).device
        self._sizes: dict[str, tuple[int, int]] = {}  # group → number of its units, in the model and in a sub-model
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
        """Returns the units of a client's sub-model; `key` is the client's key of the round."""
        return {
            group: torch.from_numpy(key.fold("dropout").fold(group).permutation(size)[:kept]).sort()[0].to(self._device)
            for group, (size, kept) in self._sizes.items()
        }

    def cut(self, tensors: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
        """Returns the sub-model's part of the model's tensors. Tensors without units are returned as they are."""
        parts = {}
        for name, part in tensors.items():
            for axis, group in self._axes[name].items():
                size, _ = self._sizes[group]
                part = torch.unflatten(part, axis, (size, -1)).index_select(axis, units[group]).flatten(axis, axis + 1)
            parts[name] = part
        return parts

    def whole(self, parts: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
        """Returns the model's tensors from those of a sub-model, with 0 for the other units: the inverse of `cut`."""
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
        """Returns the sum of the clients' weights for each coordinate: of the clients whose sub-model holds it.

        cohort: The key of the round and the weight of each client.

        The sums are int64, in shapes that broadcast to those of the tensors. The sum is 1 for a coordinate that no
        client holds, because the mean divides by it.
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
        """Returns a copy of the model with the shapes of a sub-model."""
        copy = deepcopy(model)
        first = {group: torch.arange(kept, device=self._device) for group, (_, kept) in self._sizes.items()}
        for name, part in self.cut(copy.state_dict(), first).items():
            owner, _, own = name.rpartition(".")
            module = copy.get_submodule(owner)
            whole = getattr(module, own)
            setattr(module, own, nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part)
        return channels_last(copy)
