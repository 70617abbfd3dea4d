"""Regression: numbers for each example."""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fedq.errors import check_choice, check_range
from fedq.learning.task import Reduction, Sums, Task, TaskError, in_words, remedy, squeezed

Loss = Literal["mse", "huber"]


class Regression(Task):
    """Numbers: squared error or Huber's loss, mean absolute error ("mae"), and the coefficient of determination ("r2").

    Outputs and targets are floats of equal shape (N, …); outputs of shape (N, 1) also go with targets of shape (N,).
    The mean absolute error is over all numbers.

    R² is 1 − Σ (y − f)² / Σ (y − ȳ)² for each output; "r2" is the mean over outputs whose targets vary. Sums are
    float64. Targets whose deviation is less than a millionth of their root mean square do not count as varying. Without
    varying targets there is no R².
    """

    headline = "mae"
    more_is_better = False
    reported = {"targets": int, "absolute_error": float}  # noqa: RUF012

    def __init__(self, loss: Loss = "mse", delta: float = 1.0) -> None:
        """Takes the loss.

        loss: "mse" for the squared error, "huber" for Huber's loss (Huber 1964).
        delta: Huber's loss is linear for errors above this value.
        """
        check_choice("loss", loss, Loss)
        check_range("delta", delta, above=0)
        self._loss, self.delta = loss, delta

    @override
    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        outputs = squeezed(outputs.double() if reduction == "sum" else outputs, targets)
        targets = targets.to(outputs.dtype)
        if self._loss == "mse":
            return F.mse_loss(outputs, targets, reduction=reduction)
        return F.huber_loss(outputs, targets, reduction=reduction, delta=self.delta)

    @override
    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        return {"absolute_error": (squeezed(outputs, targets).double() - targets.double()).abs().sum()}

    @override
    def test_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Adds sums of targets, of their squares and of squared errors, each of shape (outputs,)."""
        y = targets.double().reshape(len(targets), -1)
        errors = outputs.double().reshape(y.shape) - y
        return {
            **self.sums(outputs, targets),
            "squared_error": errors.square().sum(0),
            "total": y.sum(0),
            "squares": y.square().sum(0),
        }

    @override
    def metrics(self, sums: Sums) -> dict[str, float]:
        metrics = {"loss": sums["loss"] / sums["targets"], "mae": sums["absolute_error"] / sums["targets"]}
        if "total" in sums:
            total = sums["total"]
            variation = sums["squares"] - total.square() * len(total) / sums["targets"]
            varies = variation > 1e-12 * sums["squares"]  # a smaller difference of the sums is a rounding error
            if varies.any():
                metrics["r2"] = float((1 - sums["squared_error"][varies] / variation[varies]).mean())
        return metrics

    @override
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        fits = squeezed(outputs, targets).shape[1:] == targets.shape[1:] and targets.is_floating_point()
        if not fits or not bool(targets.isfinite().all()):
            raise TaskError(
                "task=regression takes outputs and finite, floating targets of equal shape, not "
                f"{in_words(outputs, targets)}{remedy(self, targets) if not fits else ' with NaN or infinity'}"
            )

    @override
    def can_give(self, sums: Sums) -> bool:
        loss, error, targets = sums["loss"], sums["absolute_error"], sums["targets"]
        if not (loss >= 0 and error >= 0):
            return False
        # Cauchy and Schwarz: (Σ|e|)² ≤ n·Σe²; and Huber's loss of e is at least delta·(|e| − delta/2)
        most = (
            math.sqrt(loss) * math.sqrt(targets)
            if self._loss == "mse"
            else loss / self.delta + targets * self.delta / 2
        )
        return bool(error <= 1.001 * most + 1e-18 * targets)  # float32 rounds losses, and small squares to 0
