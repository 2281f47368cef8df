"""Whether a model type of the installed transformers is compressed exactly, found out by running it.

`shrink` makes a tiny text config, `build` a whole model around it, `prompts` a batch with features,
`oracle` the reference, and `checks` compares. `run` does so for many types, `table` keeps and shows
the results.
"""
