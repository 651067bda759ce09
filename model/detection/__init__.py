"""Mask R-CNN and its weights."""
