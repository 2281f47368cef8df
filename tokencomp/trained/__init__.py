"""The trained networks of reducers, and the files that store their weights."""
