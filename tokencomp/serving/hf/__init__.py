"""An OpenAI-compatible server on transformers: every supported model, every reducer."""
