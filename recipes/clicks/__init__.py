"""A tiny model that clicks."""
