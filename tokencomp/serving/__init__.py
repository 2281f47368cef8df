"""The vLLM plugin, and an OpenAI-compatible server for Hugging Face models."""
