"""Next token: a class for each place of a sequence."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fedq.errors import check_range
from fedq.learning.task import Classification, Reduction, Sums, TaskError, check_classes, in_words, remedy


class NextToken(Classification):
    """The next token at each place: cross entropy, accuracy, and perplexity, the exponential of the mean loss.

    Outputs are logits, shape (N, T, vocabulary). Targets are ids of tokens, int64, shape (N, T). Loss and metrics are
    means over tokens.
    """

    reported = {"targets": int, "correct": int}  # noqa: RUF012

    def __init__(self, padding: int | None = 0, special: Sequence[int] = ()) -> None:
        """Takes the ids with a meaning of their own.

        padding: The id that fills sequences up, and counts nowhere; None if there is none.
        special: Ids that "accuracy_without_special" leaves out, such as the unknown word and the end of a sentence
            (Reddi 2021, appendix C).
        """
        check_range("padding", padding, integer=True, optional=True)
        for token in special:
            check_range("special: an id", token, 0, integer=True)
        self.padding, self.special = padding, list(special)

    @override
    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        ignored = -100 if self.padding is None else self.padding
        of_tokens, tokens = outputs.flatten(0, -2), targets.flatten()
        if reduction == "sum":
            return F.cross_entropy(of_tokens, tokens, ignore_index=ignored, reduction="none").double().sum()
        # torch's own mean over no token is NaN
        return F.cross_entropy(of_tokens, tokens, ignore_index=ignored, reduction="sum") / max(1, self.count(targets))

    @override
    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        return {"correct": (self._counts(targets) & (outputs.argmax(-1) == targets)).sum()}

    @override
    def test_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        right, counts = outputs.argmax(-1) == targets, self._counts(targets)
        sums = {"correct": (right & counts).sum()}
        if self.special:
            counts &= ~torch.isin(targets, torch.tensor(self.special, device=targets.device))
            sums |= {"correct_words": (right & counts).sum(), "words": counts.sum()}
        return sums

    @override
    def metrics(self, sums: Sums) -> dict[str, float]:
        metrics = super().metrics(sums)
        if sums.get("words"):
            metrics["accuracy_without_special"] = sums["correct_words"] / sums["words"]
        return metrics | {"perplexity": float(torch.tensor(metrics["loss"], dtype=torch.float64).exp())}

    @override
    def count(self, targets: Tensor) -> int:
        return int(self._counts(targets).sum())

    @override
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        fits = outputs.dim() > 2 and outputs.shape[1:-1] == targets.shape[1:]
        if not fits or targets.dtype != torch.int64:
            raise TaskError(
                "task=next_token takes outputs of shape (N, T, vocabulary) and int64 targets of shape (N, T), not "
                f"{in_words(outputs, targets)}{remedy(self, targets)}"
            )
        check_classes(targets[self._counts(targets)], outputs.shape[-1])

    def _counts(self, targets: Tensor) -> Tensor:
        """Returns which targets count: all but the padding."""
        return torch.ones_like(targets, dtype=torch.bool) if self.padding is None else targets != self.padding
