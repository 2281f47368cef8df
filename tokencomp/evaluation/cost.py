"""What the LLM's prefill of each sample costs: visual tokens per layer, FLOPs, KV bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tokencomp.engine.flops import DecoderShape
from tokencomp.engine.stats import Stats


@dataclass(frozen=True)
class Cost:
    """Cost of one sample.

    Attributes
    ----------
    visual_tokens
        Visual tokens of the uncompressed prompt.
    per_layer
        Visual tokens seen by each decoder layer.
    flops
        FLOPs of the decoder layers for this prefill.
    kv_bytes
        Bytes of keys and values it caches.
    """

    visual_tokens: int
    per_layer: list[int]
    flops: int
    kv_bytes: int

    @property
    def ratio(self) -> float:
        """Achieved ratio: 1 - mean over layers of visual tokens seen / of the full prompt."""
        full = self.visual_tokens * len(self.per_layer)
        return 1 - sum(self.per_layer) / full if full else 0.0

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def _cost(shape: DecoderShape, length: int, visual: int, per_layer: list[int], full: int) -> Cost:
    rows = [length - visual + n for n in per_layer]
    flops = sum(shape.layer_flops(n) for n in rows)
    return Cost(full, per_layer, flops, sum(rows) * shape.kv_bytes_per_token)


def compressed_costs(stats: Stats) -> list[Cost]:
    """Cost of every sample of the last compressed prefill."""
    rows = zip(stats.lengths, stats.tokens_before, stats.tokens_after, strict=True)
    return [_cost(stats.shape, n, visual, seen, visual) for n, visual, seen in rows]


def plain_costs(
    shape: DecoderShape, lengths: list[tuple[int, int]], full: list[int] | None = None
) -> list[Cost]:
    """Cost of every sample of an uncompressed prefill.

    Parameters
    ----------
    shape
        Sizes of the decoder.
    lengths
        Per sample: all tokens, and visual tokens.
    full
        Visual tokens before an input baseline shrank the media; None if nothing was shrunk.
    """
    before = full or [visual for _, visual in lengths]
    return [
        _cost(shape, n, visual, [visual] * shape.num_layers, wanted)
        for (n, visual), wanted in zip(lengths, before, strict=True)
    ]
