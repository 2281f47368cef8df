"""Accuracy with paired intervals, baselines, reports."""
