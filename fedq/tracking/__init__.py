"""What a run leaves and shows: TensorBoard, metrics file, summary, console; each takes the metrics round by round."""

from fedq.tracking.console import ConsoleProgress
from fedq.tracking.metrics import Metrics, MetricsFile
from fedq.tracking.summary import Summary
from fedq.tracking.tensorboard import TensorBoard
from fedq.tracking.units import human_bytes

__all__ = ["ConsoleProgress", "Metrics", "MetricsFile", "Summary", "TensorBoard", "human_bytes"]
