"""Tiny random models of every family, one file per group."""
