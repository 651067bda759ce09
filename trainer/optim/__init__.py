"""The project's own optimizers, and the grouping of parameters."""
