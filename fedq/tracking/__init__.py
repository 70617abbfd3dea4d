"""What a run writes and shows: metrics file, summary, TensorBoard, console. Each receives the metrics of each round."""
