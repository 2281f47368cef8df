"""An OpenAI-compatible server on transformers for every supported model and reducer."""
