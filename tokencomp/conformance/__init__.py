"""Finds out by running them which model types of the installed transformers are exact.

`shrink` makes a tiny text config, `build` a whole model around it, `prompts` a batch with features,
`oracle` the reference, and `checks` compares. `run` does so for many types, `table` keeps and shows
the results.
"""
