"""Speed against accuracy of the tower stage: `python -m benchmarks.frontier`."""
