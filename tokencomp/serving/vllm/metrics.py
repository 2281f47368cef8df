"""What compression did, for `/metrics` and the log.

Counts of tokens are taken in the front-end process, which also answers `/metrics`. Reduction runs
in the workers: their times reach `/metrics` in Prometheus' multi-process mode (`tokencomp serve`
turns it on) and the log in any case.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger

from tokencomp.serving.vllm.item_plan import ItemPlan, field_name

logger = init_logger("vllm.tokencomp")
LOG_EVERY = 60.0
REMEMBERED = 16384


@lru_cache(maxsize=1)
def achieved() -> Gauge:
    """The ratio of the last request with media, in this process."""
    name, text = "tokencomp_achieved_ratio", "Achieved ratio of the last request with media"
    return Gauge(name, text, multiprocess_mode="mostrecent")


@lru_cache(maxsize=1)
def counters() -> dict[str, Counter]:
    """The counters of this process; made once, on first use."""
    make = {
        "before": "Visual tokens of all requests before compression",
        "after": "Visual tokens of all requests that reached the language model",
    }
    found = {n: Counter(f"tokencomp_visual_tokens_{n}", text) for n, text in make.items()}
    found["items"] = Counter("tokencomp_media_items", "Images and videos", ["compressed"])
    found["seconds"] = Counter("tokencomp_reduce_seconds", "Time spent reducing, in the workers")
    return found


class SeenPlans:
    """Plans by media hash: media that come from a cache come without theirs."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, ItemPlan] = OrderedDict()

    def of(self, result: Any) -> list[tuple[int, ItemPlan | None]]:
        """Media tokens, and the plan if compressed, of all items of a `MultiModalInput`."""
        found = []
        for modality, hashes in result["mm_hashes"].items():
            items = result["mm_kwargs"].get(modality, [None] * len(hashes))
            ranges = result["mm_placeholders"].get(modality, [])
            for key, item, place in zip(hashes, items, ranges, strict=True):
                if item is not None and field_name(modality) in item:
                    self._remember(key, ItemPlan.from_tensor(item[field_name(modality)].data))
                plan = self._known.get(key)
                found.append((plan.kept if plan else place.get_num_embeds(), plan))
        return found

    def _remember(self, key: str, plan: ItemPlan) -> None:
        self._known[key] = plan
        self._known.move_to_end(key)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)


def count_request(items: list[tuple[int, ItemPlan | None]]) -> None:
    """Count the media of one request, as `SeenPlans.of` gives them."""
    for kept, plan in items:
        full = plan.full if plan else kept
        counters()["before"].inc(full)
        counters()["after"].inc(kept)
        counters()["items"].labels(str(full != kept).lower()).inc()
    before = sum(plan.full if plan else kept for kept, plan in items)
    if before:
        achieved().set(1 - sum(kept for kept, _ in items) / before)


class ReduceTimer:
    """Times the reductions of a worker and logs a summary once a minute."""

    def __init__(self) -> None:
        self._since = time.monotonic() - LOG_EVERY  # the first reduction is logged at once
        self._items = self._before = self._after = 0
        self._seconds = 0.0

    @contextlib.contextmanager
    def __call__(self, plan: ItemPlan) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        counters()["seconds"].inc(seconds)
        self._items, self._seconds = self._items + 1, self._seconds + seconds
        self._before, self._after = self._before + plan.full, self._after + plan.kept
        if time.monotonic() - self._since >= LOG_EVERY:
            self._log(plan.reducer)

    def _log(self, reducer: str) -> None:
        logger.info(
            "tokencomp worker %d, %s: %d items, %d → %d tokens (ratio %.3f), %.1f ms",
            os.getpid(), reducer, self._items, self._before, self._after,
            1 - self._after / self._before, 1e3 * self._seconds,
        )  # fmt: skip
        self._since = time.monotonic()
        self._items = self._before = self._after = 0
        self._seconds = 0.0
