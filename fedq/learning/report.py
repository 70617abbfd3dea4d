"""Reports: the numbers that a client sends beside its update."""

import torch

from fedq.encoding import Key, MessageError, StateDictEncoder, TensorSpec
from fedq.learning.local_training import LocalTraining, TrainingMetrics
from fedq.learning.round import Registered
from fedq.learning.task import Task

_LARGEST_LOSS = torch.finfo(torch.float32).max  # the largest loss of a target: the sum over any cohort is finite
_REPORT = "report/"


class Reports:
    """Writes and reads clients' reports.

    codec: The codec of a report.
    """

    def __init__(self, task: Task, training: LocalTraining) -> None:
        """Takes the task and the clients' local training."""
        self._task, self._training = task, training
        self.codec = StateDictEncoder().bind(
            {
                _REPORT + name: TensorSpec((), torch.float64 if kind is float else torch.int64)
                for name, kind in {"loss": float, **task.reported, "seen": int, "steps": int}.items()
            }
        )

    def write(self, metrics: TrainingMetrics, key: Key) -> bytes:
        """Returns the bytes of a client's report."""
        values = {**metrics.sums, "seen": metrics.seen, "steps": metrics.steps}
        schema = self.codec.schema.items()
        tensors = {name: torch.tensor(values[name.removeprefix(_REPORT)], dtype=spec.dtype) for name, spec in schema}
        return self.codec.encode(tensors, key).message

    def read(self, report: bytes, key: Key, registered: Registered) -> TrainingMetrics:
        """Returns what a client reports.

        The server cannot check the loss and the task's sums against the examples: inside the bounds below, a client can
        forge them. Forged numbers reach metrics only, never the weights.

        Raises MessageError for damaged bytes, and for numbers that the client's training cannot give.
        """
        loss, *sums, seen, steps = (value.item() for value in self.codec.decode(report, key).tensors.values())
        reported = dict(zip(self._task.reported, sums, strict=True))
        metrics = TrainingMetrics({"loss": loss, "targets": seen} | reported, int(seen), int(steps))
        examples, targets = registered
        # a client sees each example once in each epoch, and perhaps some examples once more
        if (
            not (examples and self._training.can_give(metrics, examples))
            or not seen // examples * targets <= metrics.sums["targets"] <= -(-seen // examples) * targets
            or not abs(loss) <= _LARGEST_LOSS * metrics.sums["targets"]
            or not self._task.can_give(metrics.sums)
        ):
            raise MessageError(f"no training gives the report {metrics} of {examples} examples, {targets} targets")
        return metrics
