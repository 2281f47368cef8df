"""Cost of each sample: visual tokens per layer, FLOPs and KV bytes of the LLM."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.stats import LayerShape, Stats, layer_shapes
from tokencomp.inputs.prompts import prompt_lengths


@dataclass(frozen=True)
class Cost:
    """Cost of one sample: uncompressed visual tokens, and the visual tokens of each decoder layer.

    `flops` and `kv_bytes` are those of the decoder layers for the prefill and the keys and values
    that it caches; `decode_flops` those of one further token.
    """

    visual_tokens: int
    per_layer: list[int]
    flops: int
    kv_bytes: int
    decode_flops: int = 0

    @property
    def ratio(self) -> float:
        """Achieved ratio: 1 - mean over layers of visual tokens seen / of the full prompt."""
        full = self.visual_tokens * len(self.per_layer)
        return 1 - sum(self.per_layer) / full if full else 0.0

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def _cost(
    layers: list[LayerShape],
    length: int,
    visual: int,
    per_layer: list[int],
    full: int,
    merged_from: int | None = None,
) -> Cost:
    """See `Stats`."""
    rows = [length - visual + n for n in per_layer]
    first = len(rows) if merged_from is None else merged_from
    held = [*zip(layers, rows, strict=True)]
    flops = sum(layer.flops(n, 0, i >= first) for i, (layer, n) in enumerate(held))
    kv_bytes = sum(layer.kv_bytes(n) for layer, n in held)
    decode = sum(layer.flops(1, n) for layer, n in held)
    return Cost(full, per_layer, flops, kv_bytes, decode)


def prefill_costs(
    model: Any, inputs: dict[str, Any], stats: Stats | None, full: list[int] | None = None
) -> list[Cost]:
    """Cost of every sample of a prefill with `inputs`.

    `stats` are those of the handle; None or empty if nothing was compressed. `full`: visual tokens
    per sample before an input baseline shrank the media, if one did.
    """
    if stats:
        counts = stats.lengths, stats.tokens_before, stats.tokens_after
        layers, first, rows = stats.layers, stats.merged_from, zip(*counts, strict=True)
        return [_cost(layers, n, all_, seen, all_, first) for n, all_, seen in rows]
    layers = layer_shapes(adapter_for(model).text_config, model.dtype.itemsize)
    lengths = prompt_lengths(model, inputs)
    before = full or [visual for _, visual in lengths]
    return [
        _cost(layers, n, visual, [visual] * len(layers), visual_before)
        for (n, visual), visual_before in zip(lengths, before, strict=True)
    ]
