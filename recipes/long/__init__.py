"""The training of a tiny model that writes long answers made of facts."""
