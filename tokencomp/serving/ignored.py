"""Fields that clients and gateways send and that change no answer: both servers ignore them."""

from __future__ import annotations

REQUEST = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
)  # fmt: skip
HINTS = ("reasoning_effort", "verbosity")  # on transformers; vLLM reads the first
MESSAGE = ("annotations", "cache_control")
PART = ("cache_control",)
URL = ("format",)
