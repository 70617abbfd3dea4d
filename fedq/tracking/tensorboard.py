"""TensorBoard: the curves, and the hyperparameters that distinguish runs."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from time import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from fedq.tracking.headline import ACCURACY, Headline
from fedq.tracking.metrics import Metrics

TUTORIAL = {"train/loss": "loss", "train/accuracy": "sparse_categorical_accuracy"}
"""Metrics that are also written under their names in TensorFlow Federated's tutorial."""
_TOTALS = ("cumulative_broadcasted_bits", "cumulative_aggregated_bits", "cumulative_simulated_seconds")
_OWN_NAME = ("train", "test", "validation", "per_client", "seconds", *_TOTALS)
"""Metrics whose tag equals their name. All other tags begin with "round/", so that TensorBoard groups them."""


class TensorBoard:
    """Writes the metrics of each round as scalars, and the run's hyperparameters.

    A step is the number of rounds that were done when a value was measured. Clients begin a round with the weights of
    the rounds before, so the steps of training metrics begin at 0. Tests and byte counters come after a round, so the
    steps of all other tags begin at 1. Tags that begin with "at_a_glance/" fill TensorBoard's first screen.

    All events of a run are in one file. A resumed run writes the file anew, so that no step occurs twice.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        hparams: Mapping[str, str | float | bool],
        done: Iterable[Metrics] = (),
        headline: Headline = ACCURACY,
    ) -> None:
        """Starts the file, and deletes the files of earlier processes.

        folder: the run's folder.
        name: the subfolder of `folder` that holds the file; TensorBoard shows this name.
        hparams: the run's hyperparameters; TensorBoard finds out which hyperparameters differ between runs.
        done: the metrics of the rounds before this process.
        headline: the metric that is also drawn over the bytes sent.
        """
        self._headline = f"test/{headline.name}"
        place, now, done = folder / name, time(), list(done)
        place.mkdir(exist_ok=True)
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        self._path = place / f"events.out.tfevents.{now:017.6f}.fedq"
        self._file = self._path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        # torch's first summary would fix the columns of TensorBoard's table; without this summary TensorBoard finds
        # them
        _, start, self._end = hparams_summaries(dict(hparams), {})
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(session_log=SessionLog(status=SessionLog.START)))  # an open TensorBoard forgets old events
        self._add(Event(summary=start, wall_time=now))
        ended = now - sum(metrics["seconds"] for metrics in done)
        for metrics in done:
            ended += metrics["seconds"]
            self.write(metrics, ended)

    def write(self, metrics: Metrics, ended: float | None = None) -> None:
        """Adds one round.

        metrics: the round's metrics, under their names in metrics.jsonl.
        ended: the Unix time at which the round ended, None for now.

        Raises OSError with the file's path if the disk is full.
        """
        done, ended = int(metrics["round"]) + 1, ended or time()
        sent = metrics["cumulative_broadcasted_bits"] + metrics["cumulative_aggregated_bits"]
        training: Metrics = {}
        others = {"at_a_glance/sent_MiB": sent / 8 / 2**20}
        for name, value in metrics.items():
            group = name.split("/")[0]
            if group == "train":
                training |= {name: value, TUTORIAL.get(name, name): value}
            elif name != "round":
                others[name if group in _OWN_NAME else f"round/{name}"] = value
            if group in ("test", "validation"):
                others[f"at_a_glance/{name.replace('/', '_')}"] = value
        self._add_scalars(done - 1, training, ended)
        self._add_scalars(done, others, ended)
        if self._headline in metrics:
            tag, value = f"at_a_glance/{self._headline.replace('/', '_')}_by_", metrics[self._headline]
            self._add_scalars(int(sent / 8 / 2**10), {f"{tag}KiB": value}, ended)
            if "cumulative_simulated_seconds" in metrics:
                self._add_scalars(
                    int(metrics["cumulative_simulated_seconds"]), {f"{tag}simulated_second": value}, ended
                )

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes the file, and marks the run as successful if no exception was raised."""
        try:
            if kind is None:
                self._add(Event(summary=self._end, wall_time=time()))
        finally:
            with suppress(OSError):  # all events are written: the file has no buffer
                self._file.close()

    def _add_scalars(self, step: int, scalars: Mapping[str, float], ended: float) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(Event(step=step, wall_time=ended, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
