"""Training and scoring detectors."""
