"""FLOPs, KV bytes, and where the time to first token goes."""
