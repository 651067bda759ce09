"""Weights that others wrote, dict in, dict out."""
