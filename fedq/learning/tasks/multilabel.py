"""Multilabel: any number of labels for each example."""

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fedq.errors import check_range
from fedq.learning.task import Reduction, Sums, Task, TaskError, in_words, remedy, squeezed


class Multilabel(Task):
    """Labels that an example has or lacks: binary cross entropy, micro F1, and mean average precision.

    Outputs are logits, shape (N, labels). Targets are 0 or 1, or false or true, of any dtype and of the same shape. A
    label is predicted if its probability is above 1/2.

    Micro F1 is 2·hits / (predicted + positive), each counted over all examples and labels; 0 / 0 counts as 0. Average
    precision is the area below precision over recall, Σ (R_k − R_(k+1))·P_k over thresholds k / bins. The mean is over
    the labels that at least one example has; without such labels, the metric is left out.
    """

    headline = "micro_f1"
    reported = {"targets": int, "hits": int, "predicted": int, "positive": int}  # noqa: RUF012

    def __init__(self, bins: int = 200) -> None:
        """bins: The number of bins of equal width into which average precision sorts the probabilities."""
        check_range("bins", bins, 1, integer=True)
        self.bins = bins

    @override
    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        outputs = squeezed(outputs.double() if reduction == "sum" else outputs, targets)
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction=reduction)

    @override
    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        predicted, positive = squeezed(outputs, targets) > 0, targets.bool()
        return {"hits": (predicted & positive).sum(), "predicted": predicted.sum(), "positive": positive.sum()}

    @override
    def test_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Adds "histogram", (2, labels, bins): how often a label that is absent, or present, falls into each bin."""
        outputs, present = outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1).long()
        bins = (outputs.sigmoid().nan_to_num() * self.bins).long().clamp(max=self.bins - 1)
        labels = outputs.shape[1]
        places = (present * labels + torch.arange(labels, device=outputs.device)) * self.bins + bins
        histogram = torch.bincount(places.flatten(), minlength=2 * labels * self.bins)
        return {**self.sums(outputs.reshape(targets.shape), targets), "histogram": histogram.reshape(2, labels, -1)}

    @override
    def metrics(self, sums: Sums) -> dict[str, float]:
        metrics = {
            "loss": sums["loss"] / sums["targets"],
            "micro_f1": 2 * sums["hits"] / max(1, sums["predicted"] + sums["positive"]),
        }
        if "histogram" in sums:
            absent, present = sums["histogram"].double()
            hits = present.flip(1).cumsum(1)
            predicted = hits + absent.flip(1).cumsum(1)
            average_precision = (present.flip(1) * hits / predicted.clamp(min=1)).sum(1) / present.sum(1)
            if present.any():
                metrics["mean_average_precision"] = float(average_precision.nanmean())
        return metrics

    @override
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        fits = outputs.dim() == 2 and squeezed(outputs, targets).shape[1:] == targets.shape[1:]
        if not fits or targets.is_complex() or not bool(((targets == 0) | (targets == 1)).all()):
            raise TaskError(
                "task=multilabel takes outputs of shape (N, labels) and targets of equal shape, each 0 or 1, not "
                f"{in_words(outputs, targets)}{remedy(self, targets) if not fits else ' with other values'}"
            )

    @override
    def can_give(self, sums: Sums) -> bool:
        hits, predicted, positive = sums["hits"], sums["predicted"], sums["positive"]
        return bool(
            sums["loss"] >= 0
            and 0 <= hits <= min(predicted, positive)
            and predicted + positive - hits <= sums["targets"]
        )
