"""Training of the methods that are trained ones."""
