"""The bridge to lmms-eval: the only place that imports `lmms_eval`."""
