"""Sounds: a tiny model that listens, its training, and questions about what is heard when."""
