"""The output of a run: metrics file, summary, TensorBoard and console. Each receives the metrics of each round."""
