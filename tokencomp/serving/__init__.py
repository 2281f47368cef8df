"""Serving: a vLLM plugin, and an OpenAI-compatible server for everything else."""
