"""Benchmarks of tokencomp: `README.md` says which page answers which question."""
