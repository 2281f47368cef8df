"""What compression costs a model that listens."""
