"""Metrics of compression for `/metrics`.

The front-end process counts tokens and also answers `/metrics`. Reducers run in the workers, whose
times reach it in the multi-process mode of Prometheus, which `tokencomp serve` turns on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any

from prometheus_client import Counter
from vllm.logger import init_logger

from tokencomp.method import Method
from tokencomp.serving.item_plan import ItemPlan, ItemSize, field_name
from tokencomp.serving.saved import Saved

logger = init_logger("vllm.tokencomp")


@lru_cache(maxsize=1)
def counters() -> dict[str, Counter]:
    """Return the counters of this process, which are created at the first call."""
    return {
        "nonfinite": Counter(
            "tokencomp_nonfinite_items", "Items whose features were not finite, in the workers"
        ),
        "seconds": Counter("tokencomp_reduce_seconds", "Time spent reducing, in the workers"),
    }


def item_sizes(
    result: Any, known: MutableMapping[str, ItemSize]
) -> dict[str, list[tuple[int, ItemSize | None]]]:
    """By modality, for all items of a `MultiModalInput`: kept tokens, and size if planned.

    Cached media come without their plan; their sizes are in `known`, by media hash. Plans are not
    stored, because a video's may list all frames.
    """
    sizes: dict[str, list[tuple[int, ItemSize | None]]] = {}
    for modality, hashes in result["mm_hashes"].items():
        items = result["mm_kwargs"].get(modality, [None] * len(hashes))
        ranges = result["mm_placeholders"].get(modality, [])
        sizes[modality] = []
        for key, item, place in zip(hashes, items, ranges, strict=True):
            if item is not None and field_name(modality) in item:
                known[key] = ItemPlan.from_tensor(item[field_name(modality)].data).size
            size = known.get(key)
            sizes[modality].append((size.kept if size else place.get_num_embeds(), size))
    return sizes


def saved_by(spec: Method, sizes: Mapping[str, Sequence[tuple[int, ItemSize | None]]]) -> Saved:
    """Return what was saved of the media of one request, which `item_sizes` returns."""
    tokens = {
        modality: (sum(s.full if s else kept for kept, s in items), sum(kept for kept, _ in items))
        for modality, items in sizes.items()
    }
    merged = any(size.merged for items in sizes.values() for _, size in items if size)
    return Saved.by(spec, tokens, merged)


def count_nonfinite(plan: ItemPlan | None, error: Exception) -> None:
    """Count an item (plan None: uncompressed) with non-finite features; log the first."""
    counters()["nonfinite"].inc()
    kept = f"{plan.reducer}: It keeps evenly spaced tokens" if plan else "off: It keeps all tokens"
    logger.warning_once(
        "tokencomp worker %d, %s, with 0 for such values; the metric tokencomp_nonfinite_items "
        "counts such items (%s)", os.getpid(), kept, error,
    )  # fmt: skip


@contextlib.contextmanager
def timed() -> Iterator[None]:
    start = time.perf_counter()
    yield
    counters()["seconds"].inc(time.perf_counter() - start)
