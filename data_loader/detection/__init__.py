"""Data for detection and instance segmentation."""
