"""C++ implementations of layers for training on a CPU, switched on by `trainer.compile`."""
