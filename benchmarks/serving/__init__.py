"""Scripts and pages of `benchmarks/serving`."""
