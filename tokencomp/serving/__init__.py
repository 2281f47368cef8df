"""Serving: plugins for vLLM and SGLang, and an OpenAI-compatible server on transformers."""

# Environment variables that the plugins of engines read: the options of the server as JSON, and "1"
# for versions and settings that were not tested. The middleware of `tokencomp serve --engine vllm`
# reads what it lets through as JSON, see `vllm.rules`; only that command sets it.
ENV_OPTIONS = "TOKENCOMP_SERVING"
ENV_RULES = "TOKENCOMP_RULES"
ENV_UNTESTED = "TOKENCOMP_ALLOW_UNTESTED"
KEY = "tokencomp"  # of our options in the processor options of a request
