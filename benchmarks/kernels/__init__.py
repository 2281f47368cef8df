"""Scripts and pages of `benchmarks/kernels`."""
