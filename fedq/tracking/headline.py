"""The metric by which runs are compared, which the task names."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Headline(NamedTuple):
    """The metric by which runs are compared.

    name: The metric's name in metrics.jsonl, after "train/" and "test/".
    more_is_better: Whether more is better. If true, the metric is a share, from 0 to 1, and is shown in per cent.
    """

    name: str = "accuracy"
    more_is_better: bool = True

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "Headline":
        """Returns the headline of a run from its summary.json; runs of earlier versions have accuracy."""
        return cls(*summary.get("headline", ACCURACY))

    def key(self, which: str) -> str:
        """Returns the name in summary.json of the "final" or the "best" value."""
        return f"{which}_test_{self.name}"

    @property
    def words(self) -> str:
        """The name in words, such as "micro f1"."""
        return self.name.replace("_", " ")

    @property
    def short(self) -> str:
        """The name in the progress bar."""
        return "acc" if self.name == "accuracy" else self.words

    def best(self, values: Iterable[float]) -> float:
        """Returns the best of the values, at least one."""
        return max(values) if self.more_is_better else min(values)

    def reaches(self, value: float, target: float) -> bool:
        """Returns whether a value is as good as the target, or better."""
        return value >= target if self.more_is_better else value <= target

    def text(self, value: float | None) -> str:
        """Returns a value for people: in per cent if more is better. None stands for NaN and infinity."""
        if value is None:
            return "not finite"
        return f"{value:.2%}" if self.more_is_better else f"{value:.4g}"

    def target_text(self, target: float) -> str:
        """Returns a target for the head of a column, such as "95 %"."""
        return f"{100 * target:g} %" if self.more_is_better else f"{target:.4g}"

    def spread_text(self, mean: float, deviation: float | None) -> str:
        """Returns a mean with its deviation, if given, such as "94.00 % ± 3.61"."""
        if not self.more_is_better:
            return f"{mean:.4g}" + (f" ± {deviation:.2g}" if deviation is not None else "")
        return f"{100 * mean:.2f} %" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


ACCURACY = Headline()
"""The headline of classification."""
