"""What happens between `patch()` and the tensors: hooks, forward pass, row layout, cache."""
