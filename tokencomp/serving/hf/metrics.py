"""The Prometheus metrics of the server on transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tokencomp.serving.hf.queue import Usage
from tokencomp.serving.saved import ServerMetrics

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKEN_SECONDS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 1, 3)


class Metrics(ServerMetrics):
    """Metrics in a separate registry, so that one process can hold several applications."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)
        counter = partial(Counter, namespace="tokencomp", registry=self.registry)
        gauge = partial(Gauge, namespace="tokencomp", registry=self.registry)
        histogram = partial(Histogram, namespace="tokencomp", registry=self.registry)
        self.reduce = counter("reduce_seconds", "Time spent in reducers")
        self.prompt = counter("prompt_tokens", "Tokens of prompts that entered the decoder")
        self.generated = counter("generated_tokens", "Tokens generated")
        self.ttft = histogram("time_to_first_token_seconds", "From arrival", buckets=SECONDS)
        answer = "Mean of an answer, after its first token"
        self.per_token = histogram("time_per_output_token_seconds", answer, buckets=TOKEN_SECONDS)
        self.whole = histogram("end_to_end_seconds", "From arrival to the end", buckets=SECONDS)
        self.batch = histogram("batch_size", "Requests per batch", buckets=BATCH_SIZES)
        self.waiting = gauge("requests_waiting", "Requests in the queue")
        self.running = gauge("requests_running", "Requests in the batch")

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
