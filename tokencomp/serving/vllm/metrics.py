"""Metrics of compression for `/metrics`.

The front-end process counts tokens and also answers `/metrics`. Reducers run in the workers, whose
times reach it in the multi-process mode of Prometheus, which `tokencomp serve` turns on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, MutableMapping
from functools import lru_cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger

from tokencomp.serving.item_plan import ItemPlan, ItemSize, field_name

logger = init_logger("vllm.tokencomp")


@lru_cache(maxsize=1)
def achieved() -> Gauge:
    """Return the gauge of the last request's achieved ratio in this process."""
    name, text = "tokencomp_achieved_ratio", "Achieved ratio of the last request with media"
    return Gauge(name, text, multiprocess_mode="mostrecent")


@lru_cache(maxsize=1)
def counters() -> dict[str, Counter]:
    """Return the counters of this process, which are created at the first call."""
    descriptions = {
        "before": "Visual tokens of all requests before compression",
        "after": "Visual tokens of all requests that reached the language model",
    }
    result = {n: Counter(f"tokencomp_visual_tokens_{n}", text) for n, text in descriptions.items()}
    result["items"] = Counter("tokencomp_media_items", "Images and videos", ["compressed"])
    result["nonfinite"] = Counter(
        "tokencomp_nonfinite_items", "Items whose features were not finite, in the workers"
    )
    result["seconds"] = Counter("tokencomp_reduce_seconds", "Time spent reducing, in the workers")
    return result


def item_sizes(
    result: Any, known: MutableMapping[str, ItemSize]
) -> list[tuple[int, ItemSize | None]]:
    """Return for all items of a `MultiModalInput` the kept tokens, and the size if planned.

    Media that come from a cache come without their plan. Their sizes are in `known`, by media hash;
    the plans would take much memory, as that of a video may list all of its frames.
    """
    sizes = []
    for modality, hashes in result["mm_hashes"].items():
        items = result["mm_kwargs"].get(modality, [None] * len(hashes))
        ranges = result["mm_placeholders"].get(modality, [])
        for key, item, place in zip(hashes, items, ranges, strict=True):
            if item is not None and field_name(modality) in item:
                known[key] = ItemPlan.from_tensor(item[field_name(modality)].data).size
            size = known.get(key)
            sizes.append((size.kept if size else place.get_num_embeds(), size))
    return sizes


def count_request(items: list[tuple[int, ItemSize | None]]) -> None:
    """Count the media of one request, which `item_sizes` returns."""
    for kept, size in items:
        full = size.full if size else kept
        counters()["before"].inc(full)
        counters()["after"].inc(kept)
        counters()["items"].labels(str(full != kept).lower()).inc()
    before = sum(size.full if size else kept for kept, size in items)
    if before:
        achieved().set(1 - sum(kept for kept, _ in items) / before)


def count_nonfinite(plan: ItemPlan | None, error: Exception) -> None:
    """Count an item whose features are not finite; the first one of a worker is logged.

    An item without a plan is not compressed.
    """
    counters()["nonfinite"].inc()
    kept = f"{plan.reducer}: It keeps evenly spaced tokens" if plan else "off: It keeps all tokens"
    logger.warning_once(
        "tokencomp worker %d, %s, with 0 for such values; the metric tokencomp_nonfinite_items "
        "counts such items (%s)", os.getpid(), kept, error,
    )  # fmt: skip


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Count the time that the block takes as time spent reducing."""
    start = time.perf_counter()
    yield
    counters()["seconds"].inc(time.perf_counter() - start)
