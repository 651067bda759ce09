"""Optimizers of our own, and which parameters go together."""
