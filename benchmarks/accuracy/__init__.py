"""Accuracy under compression: one sweep (`run`), its tables, and the studies built on it."""
