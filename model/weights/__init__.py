"""Finding, recognising, renaming and loading weights of other projects and of pretrained networks."""
