"""Pictures from arrays, for the trainer and the tools alike."""
