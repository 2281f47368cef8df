"""Which model types of the installed transformers are compressed exactly, found by running them.

`variants` says what the default config of a type leaves out, `run` checks many types, and `table`
writes the results that the package carries, and the page of a release.
"""
