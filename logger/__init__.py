"""What a run leaves to read: console lines, info.log, metrics.csv and TensorBoard events."""
