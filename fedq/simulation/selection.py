"""Chooses among the rounds of a run: the best round so far, and when to stop early."""

import logging
import math
from typing import Any

from fedq.config import RunConfig
from fedq.learning import Task
from fedq.tracking.metrics import Metrics

log = logging.getLogger(__name__)


class Selection:
    """Follows the task's headline metric, on validation examples if the run has them, else on the test set.

    Without `run.validation` and `run.patience` it follows nothing. It needs the metrics of all rounds, also of rounds
    before a resume. A resumed run then chooses as a run that never stopped.

    values: What the summary holds: `metric`, its `final` and `best` value, the `round` (rounds done) of the best, the
        `test` headline of this round, `more_is_better`, and whether the run `stopped_early`.
    improved: Whether the last round is the best.
    chooses: Whether it follows a metric.
    """

    def __init__(self, run: RunConfig, task: Task) -> None:
        self._run, self._test, self._without = run, f"test/{task.headline}", 0
        self.improved, self.chooses = False, run.validation is not None or run.patience is not None
        if run.patience and run.validation is None:
            log.warning("run.patience chooses by the test set, whose result is then too good; set run.validation")
        self.values: dict[str, Any] = {
            "metric": f"{'test' if run.validation is None else 'validation'}/{task.headline}",
            "final": None,
            "best": None,
            "round": None,
            "test": None,
            "more_is_better": task.more_is_better,
            "stopped_early": False,
        }

    def write(self, metrics: Metrics) -> None:
        """Adds one more round."""
        values, value = self.values, metrics.get(self.values["metric"])
        self.improved = False
        if value is None or not self.chooses:
            return
        values["final"], best = value, values["best"]
        self.improved = not math.isnan(value) and (
            best is None or (value > best if values["more_is_better"] else value < best)
        )
        self._without += 1
        if self.improved:
            self._without = 0
            values |= {"best": value, "round": int(metrics["round"]) + 1, "test": metrics[self._test]}

    def stops(self) -> bool:
        """Returns whether `run.patience` evaluations in a row brought no better value."""
        patience = self._run.patience
        if patience and self._without >= patience and not self.values["stopped_early"]:
            self.values["stopped_early"] = True
            log.info(
                "run.patience: %d evaluations in a row have not improved %s, which is best after %d rounds",
                self._without,
                self.values["metric"],
                self.values["round"] or 0,
            )
        return bool(self.values["stopped_early"])
