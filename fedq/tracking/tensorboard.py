"""TensorBoard: the curves, and the hyperparameters that tell runs apart."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter, summary

from fedq.tracking.metrics import Metrics

TUTORIAL = {"train/loss": "loss", "train/accuracy": "sparse_categorical_accuracy"}
"""The names that TensorFlow Federated's tutorial gives to what we call train/…; both are written."""
_HPARAM_METRICS = ("test/accuracy", "test/loss", "cumulative_broadcasted_bits", "cumulative_aggregated_bits")


class TensorBoard:
    """Writes every number of every round as a scalar, and the run's hparams, which refer to the same scalars.

    The files go into a subfolder `name` of the run's folder, because TensorBoard calls a run by its path.
    """

    def __init__(
        self, folder: Path, name: str, hparams: dict[str, str | float | bool], going_on: int | None = None
    ) -> None:
        """`going_on`: the round from which on TensorBoard forgets what an earlier process wrote; None if none did."""
        self._writer = SummaryWriter(str(folder / name), purge_step=going_on)
        # torch's add_hparams would write the metrics once more, under other names and into a second file
        experiment, start, self._end = summary.hparams(hparams, dict.fromkeys(_HPARAM_METRICS, 0.0))
        for part in (experiment, start):
            self._writer._get_file_writer().add_summary(part)

    def write(self, metrics: Metrics) -> None:
        """Adds one round."""
        step = int(metrics["round"])
        for tag, value in metrics.items():
            if tag != "round":
                self._writer.add_scalar(tag, value, step)
            if tag in TUTORIAL:
                self._writer.add_scalar(TUTORIAL[tag], value, step)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Marks the run as ended in success, if it did, and closes the file; TensorBoard never takes back an end."""
        if kind is None:
            self._writer._get_file_writer().add_summary(self._end)
        self._writer.close()
