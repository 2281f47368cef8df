"""Serving: a plugin for vLLM, and an OpenAI-compatible server for all other models."""
