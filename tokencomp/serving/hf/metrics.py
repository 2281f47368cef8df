"""The Prometheus metrics of the server on transformers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Metrics in a registry of their own, so that one process can hold several applications."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        p = "tokencomp"
        self.requests = Counter(f"{p}_requests", "Requests by HTTP status", ["status"], registry=r)
        self.before = Counter(
            f"{p}_visual_tokens_before", "Visual tokens before compression", registry=r
        )
        self.after = Counter(
            f"{p}_visual_tokens_after", "Visual tokens seen, mean over decoder layers", registry=r
        )
        self.ratio = Gauge(f"{p}_achieved_ratio", "Achieved ratio of the last batch", registry=r)
        self.reduce = Counter(f"{p}_reduce_seconds", "Time spent in reducers", registry=r)
        self.generated = Counter(f"{p}_generated_tokens", "Tokens generated", registry=r)
        self.ttft = Histogram(
            f"{p}_time_to_first_token_seconds", "From arrival", buckets=SECONDS, registry=r
        )
        self.batch = Histogram(
            f"{p}_batch_size", "Requests per batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=r
        )
        self.waiting = Gauge(f"{p}_requests_waiting", "Requests in the queue", registry=r)
