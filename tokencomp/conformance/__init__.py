"""Finds out by running them which model types of the installed transformers are exact.

`shrink` makes a tiny text config, `configs` puts it into the config of a whole model, and `build`
creates that model. `prompts` makes a batch with features, `oracle` the reference, and `checks`
compares. `run` does so for many types, `verify` for one given model; `table` writes and shows the
results.
"""
