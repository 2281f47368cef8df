"""Scripts and pages of `benchmarks/models`."""
