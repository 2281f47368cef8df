"""The Prometheus metrics of the server on transformers."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tokencomp.serving.hf.queue import Usage
from tokencomp.serving.saved import ServerMetrics

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
TOKEN_SECONDS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 1, 3)


class Metrics(ServerMetrics):
    """Metrics in a separate registry, so that one process can hold several applications."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        super().__init__(r)
        p = "tokencomp"
        self.reduce = Counter(f"{p}_reduce_seconds", "Time spent in reducers", registry=r)
        self.prompt = Counter(
            f"{p}_prompt_tokens", "Tokens of prompts that entered the decoder", registry=r
        )
        self.generated = Counter(f"{p}_generated_tokens", "Tokens generated", registry=r)
        self.ttft = Histogram(
            f"{p}_time_to_first_token_seconds", "From arrival", buckets=SECONDS, registry=r
        )
        self.per_token = Histogram(
            f"{p}_time_per_output_token_seconds",
            "Mean of an answer, after its first token",
            buckets=TOKEN_SECONDS,
            registry=r,
        )
        self.whole = Histogram(
            f"{p}_end_to_end_seconds", "From arrival to the end", buckets=SECONDS, registry=r
        )
        self.batch = Histogram(
            f"{p}_batch_size", "Requests per batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=r
        )
        self.waiting = Gauge(f"{p}_requests_waiting", "Requests in the queue", registry=r)
        self.running = Gauge(f"{p}_requests_running", "Requests in the batch", registry=r)

    def count_prefill(self, usages: Sequence[Usage]) -> None:
        """Count the tokens of a batch whose prefill has run."""
        self.batch.observe(len(usages))
        self.prompt.inc(sum(usage.prompt for usage in usages))
        for usage in usages:
            self.count(usage.saved)

    def count_answer(self, seconds: float, first: float, tokens: int) -> None:
        """Count an answer that took `seconds`, the first of its tokens `first` seconds."""
        self.running.dec()
        self.whole.observe(seconds)
        if tokens > 1:
            self.per_token.observe((seconds - first) / (tokens - 1))
