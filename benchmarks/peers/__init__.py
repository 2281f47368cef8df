"""Scripts and pages of `benchmarks/peers`."""
