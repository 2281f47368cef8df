"""Training of methods with weights."""
