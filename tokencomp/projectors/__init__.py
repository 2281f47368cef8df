"""Learned resamplers."""
