"""What a run leaves and shows: TensorBoard, metrics file, summary, console; each takes the metrics round by round."""
