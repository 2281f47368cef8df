"""Sequences of drawn screens, and the training of a tiny model that answers about the last one."""
