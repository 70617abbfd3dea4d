"""Finds the best round of a run, and decides when to stop early."""

import logging
import math
from typing import Any

from fedq.config_nodes import RunConfig
from fedq.tracking.headline import Headline
from fedq.tracking.metrics import Metrics

log = logging.getLogger(__name__)


class Selection:
    """Follows the headline metric, on validation examples if the run has them, else on the test set.

    Without both `run.validation` and `run.patience`, no metric is followed. `write` needs the metrics of all rounds,
    also of those before a resume. A resumed run then chooses the same round as a run that never stopped.

    values: The entry of the summary: the name of the `set` of examples, the `final` and the `best` value, and whether
        the run `stopped_early`. `round` (rounds done) and `test` (a value) belong to the best.
    improved: Whether the last round is the best.
    chooses: Whether a metric is followed.
    """

    def __init__(self, run: RunConfig, headline: Headline) -> None:
        self._patience, self._headline, self._without = run.patience, headline, 0
        self.improved, self.chooses = False, run.validation is not None or run.patience is not None
        if run.patience and run.validation is None:
            log.warning("run.patience chooses by the test set, whose result is then too optimistic; set run.validation")
        examples = "test" if run.validation is None else "validation"
        self._metric, self._test = (f"{name}/{headline.name}" for name in (examples, "test"))
        self.values: dict[str, Any] = {
            **{"set": examples, "final": None, "best": None, "round": None, "test": None},
            "stopped_early": False,
        }

    def write(self, metrics: Metrics) -> None:
        """Adds one more round."""
        self.improved = False
        if self._metric not in metrics or not self.chooses:
            return
        value, test = (known if math.isfinite(known := metrics[name]) else None for name in (self._metric, self._test))
        best = self.values["best"]
        self.improved = value is not None and (best is None or (value != best and self._headline.reaches(value, best)))
        self._without = 0 if self.improved else self._without + 1
        self.values["final"] = value
        if self.improved:
            self.values |= {"best": value, "round": int(metrics["round"]) + 1, "test": test}

    def stops(self) -> bool:
        """Returns whether `run.patience` evaluations in a row gave no better value."""
        if self._patience and self._without >= self._patience and not self.values["stopped_early"]:
            self.values["stopped_early"] = True
            text = "run.patience: %d evaluations in a row have not improved %s: best after %d rounds"
            log.info(text, self._without, self._metric, self.values["round"] or 0)
        return bool(self.values["stopped_early"])
