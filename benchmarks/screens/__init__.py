"""Screens and documents: what can be dropped, and what models still answer."""
