"""Layers in C++ for training on a CPU: `trainer.compile`."""
