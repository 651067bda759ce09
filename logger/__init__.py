"""What a run reports: console lines, info.log, metrics.csv and TensorBoard events."""
