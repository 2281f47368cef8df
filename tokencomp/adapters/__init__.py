"""One model family per file; see `tokencomp.adapters.base` for the contract."""
