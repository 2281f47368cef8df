"""Checks that a model type is compressed exactly, on a tiny random model of it.

`shrink` makes a tiny text config, `configs` puts it into the config of a whole model, and `build`
creates that model. `prompts` makes a batch with features, `oracle` the reference, and `checks`
compares. `verify` does so for one given model; `benchmarks/conformance` in a checkout for all types
of transformers, with the files in `results/`.
"""
