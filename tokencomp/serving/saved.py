"""Tokens saved by compression, for the usage of a request, the log, and metrics of both servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from tokencomp.method import Method

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # of the label "ratio", besides 0
BOUNDS = (0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.925, 1)  # between the ratios that people set


@dataclass(frozen=True)
class Saved:
    """Visual tokens of a request before and after compression.

    `reducer` is "none" where nothing is compressed, `requested` the ratio or budget in force.
    `tokens` has, by modality, those before, and the mean over decoder layers of those seen.
    `merge` says whether the option of that name merged dropped tokens into kept ones.
    """

    reducer: str = "none"
    requested: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    merge: bool = False

    @classmethod
    def by(
        cls, spec: Method, tokens: Mapping[str, tuple[int, float]], merge: bool = False
    ) -> Saved:
        reducer = spec.built_reducer.name if spec.active else "none"
        return cls(reducer, spec.requested, tokens, merge)

    @property
    def before(self) -> int:
        return sum(before for before, _ in self.tokens.values())

    @property
    def after(self) -> float:
        """Visual tokens that a decoder layer sees, on average over layers."""
        after = sum(after for _, after in self.tokens.values())
        return int(after) if float(after).is_integer() else after

    @property
    def reason(self) -> dict[str, str]:
        """Why nothing was removed of what was asked for; empty if something was."""
        if self.reducer == "none" or self.after < self.before or not self.before:
            return {}
        if "budget" in self.requested:
            return {
                "reason": f"no image or clip has more tokens than the budget, of "
                f"{self.before:,} in all; a smaller budget or a ratio compresses"
            }
        return {"reason": "the reducer found nothing to drop"}

    def as_usage(self) -> dict[str, Any]:
        return {
            "visual_tokens_before": self.before,
            "visual_tokens_after": self.after,
            "ratio": 1 - self.after / self.before if self.before else 0.0,
            "reducer": self.reducer,
            "merge": self.merge,
            "requested": dict(self.requested),
            **self.reason,
        }

    def __str__(self) -> str:
        """Return the words of a line of the log."""
        asked = ",".join(f"{name}={value}" for name, value in self.requested.items())
        merge = "on" if self.merge else "off"
        method = f"reducer={self.reducer} {asked or 'ratio=0'} merge={merge}"
        return f"{method} visual={self.before}->{self.after:g}"


class ServerMetrics:
    """Metrics that both servers export; the labels have few values, whatever clients send."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        labels = ("role", "reducer", "modality", "ratio")
        counter = partial(Counter, namespace="tokencomp", registry=registry)
        self.requests = counter("requests", "Requests by HTTP status", ["status"])
        self.before = counter("visual_tokens_before", "Visual tokens before compression", labels)
        self.after = counter(
            "visual_tokens_after", "Visual tokens seen, mean over decoder layers", labels
        )
        self.achieved = Histogram(
            "tokencomp_achieved_ratio", "Achieved ratio of a request's media", labels[:3],
            buckets=BOUNDS, registry=registry,
        )  # fmt: skip
        self.load_step = Gauge(
            "tokencomp_load_step", "Step of --ratio-by-load in force, 0 for the usual ratio",
            multiprocess_mode="max", registry=registry,
        )  # fmt: skip

    def count(self, saved: Saved, role: str = "all") -> None:
        """Count the visual tokens of a request that has this role here, see `vllm.roles`."""
        for modality, (before, after) in saved.tokens.items():
            if not before:
                continue
            ratio = 1 - after / before
            labels = role, saved.reducer, modality, _bucket(ratio)
            self.before.labels(*labels).inc(before)
            self.after.labels(*labels).inc(after)
            self.achieved.labels(*labels[:3]).observe(ratio)


def _bucket(ratio: float) -> str:
    """Return the nearest of `RATIOS`, and "0" only where no token was removed."""
    return str(min(RATIOS, key=lambda known: abs(known - ratio)) if ratio > 0 else 0)


@lru_cache(maxsize=1)
def process_metrics() -> ServerMetrics:
    """Return the metrics in the registry of the process, which vLLM's `/metrics` shows."""
    return ServerMetrics()
