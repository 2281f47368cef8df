"""A small model made of real weights, asked about photographs and words: see README.md."""
