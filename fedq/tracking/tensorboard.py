"""TensorBoard: the curves, and the hyperparameters that tell runs apart."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fedq.tracking.metrics import Metrics

TUTORIAL = {"train/loss": "loss", "train/accuracy": "sparse_categorical_accuracy"}
"""The names that TensorFlow Federated's tutorial gives to what we call train/…; both are written."""
_HPARAM_METRICS = ("test/accuracy", "test/loss", "cumulative_broadcasted_bits", "cumulative_aggregated_bits")


class TensorBoard:
    """Writes every number of every round as a scalar, and at the end the run's hparams with its last numbers.

    The files go into a subfolder `name` of the run's folder, because TensorBoard calls a run by its path.
    """

    def __init__(self, folder: Path, name: str, hparams: dict[str, str | float | bool]) -> None:
        self._writer = SummaryWriter(str(folder / name))
        self._hparams = hparams
        self._last: Metrics = {}

    def write(self, metrics: Metrics) -> None:
        """Adds one round."""
        step = int(metrics["round"])
        for tag, value in metrics.items():
            if tag != "round":
                self._writer.add_scalar(tag, value, step)
            if tag in TUTORIAL:
                self._writer.add_scalar(TUTORIAL[tag], value, step)
        self._last |= metrics

    def close(self) -> None:
        """Writes the hparams and closes the files."""
        last = {f"hparam/{tag}": self._last[tag] for tag in _HPARAM_METRICS if tag in self._last}
        self._writer.add_hparams(self._hparams, last, run_name=".")
        self._writer.close()
