"""Small single-purpose helpers; nothing here imports another room of the project."""
