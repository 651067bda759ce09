"""The losses; `model.loss` has their public names."""
