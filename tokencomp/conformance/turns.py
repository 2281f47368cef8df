"""Checks of what runs after a prompt: later turns, beams, cropped caches, chunks, static caches.

No reference of other code is needed: on the cache of earlier calls the patched model must give the
logits that it gives without a cache for the same ids under the same plan. The unpatched model is
the control: where it fails in the same way, the check says nothing about compression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tokencomp.conformance.prompts import Prompts, Row
from tokencomp.method import Method
from tokencomp.plan.plan import Plan, Stage
from tokencomp.reducers.uniform import Uniform

TURNS = ("turn", "turn media", "beams", "crop", "lookup", "chunks", "static")
DROPPED, STEPS, CROPPED, CHUNK = Plan((Stage(0, 0.5, Uniform()),)), 3, 2, 8
ASSISTED = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
AGAIN = (130, 131, 130, 131, 132, 130)
"""Words whose last one occurs before, so that prompt lookup has drafts. A random model rejects most
of them, and crops the cache."""
Enter = Callable[[], AbstractContextManager[Any]]


def default_plan(depth: int) -> Plan:
    """The plan of `patch(model)` for a decoder of `depth` layers: merges where the model can."""
    return Method("auto", ratio=0.5).stages(depth, 1)


class Turns:
    """The checks on the cache of one model; each returns the largest difference of logits.

    `enter` starts a block in which the model is patched or, for the control, is not.
    """

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def run(self, name: str, enter: Enter) -> float:
        """The largest difference of the check `name`, alone and in a ragged batch."""
        check: Callable[[list[Row]], Iterator[float]] = getattr(self, f"_{name.replace(' ', '_')}")
        both = self.prompts.rows
        batches = [both[:1]] if name == "lookup" else [both[:1], both]
        with enter():
            return max(value for rows in batches for value in check(rows))

    def _turn(self, rows: list[Row]) -> Iterator[float]:
        """Words after the answer to a prompt."""
        cache, longer = self._answered(rows)
        yield self._against_none(self._again(longer), rows, cache)

    def _turn_media(self, rows: list[Row]) -> Iterator[float]:
        """An image, or a clip, between words after the answer to a prompt."""
        cache, longer = self._answered(rows)
        new = [self.prompts.row((2, 3), seed) for seed, _ in enumerate(rows)]
        after = [
            (ids + words, torch.cat([media, more]))
            for (ids, media), (words, more) in zip(longer, new, strict=True)
        ]
        turn = self.prompts.turn(after, rows, self.prompts.width(longer) - 1)
        turn[self.prompts.cache_name] = cache
        logits = self.prompts.forward(turn, use_cache=True).logits[:, -1]
        whole = self.prompts.forward(self.prompts.turn(after), use_cache=False).logits[:, -1]
        yield float((logits - whole).abs().max())

    def _crop(self, rows: list[Row]) -> Iterator[float]:
        """Other words in place of the last ones of the answer."""
        cache, longer = self._answered(rows)
        cache.crop(-CROPPED)
        shorter = [(ids[: -CROPPED - 1], media) for ids, media in longer]
        yield self._against_none(self._again(shorter), rows, cache)

    def _lookup(self, rows: list[Row]) -> Iterator[float]:
        """Assisted decoding crops rejected drafts. On earlier caches it fails without a patch."""
        yield self._against_none(self._again(rows), options=ASSISTED)

    def _chunks(self, rows: list[Row]) -> Iterator[float]:
        """A prefill in pieces."""
        yield self._against_none(rows, options={"prefill_chunk_size": CHUNK})

    def _static(self, rows: list[Row]) -> Iterator[float]:
        """A cache that has its size before the prompt."""
        yield self._against_none(rows, options={"cache_implementation": "static"})

    def _beams(self, rows: list[Row]) -> Iterator[float]:
        """The score of the best beam: the caches of beams are reordered between steps."""
        out = self._generate(rows, num_beams=3, output_scores=True)
        words = out.sequences[:, -STEPS:]
        logits = self._without_cache(rows, words).log_softmax(-1)
        expected = logits.gather(-1, words[..., None])[..., 0].mean(-1)
        yield float((out.sequences_scores - expected).abs().max())

    def _answered(self, rows: list[Row]) -> tuple[Any, list[Row]]:
        """The cache of prompts and their answers, and the prompts with the answers."""
        out = self._generate(rows)
        answers = out.sequences[:, -STEPS:].tolist()
        cache = getattr(out, "cache", None) or out.past_key_values
        return cache, self._continued(rows, answers)

    def _continued(self, rows: list[Row], words: list[list[int]]) -> list[Row]:
        return [(ids + more, media) for (ids, media), more in zip(rows, words, strict=True)]

    def _again(self, rows: list[Row]) -> list[Row]:
        return self._continued(rows, [list(AGAIN)] * len(rows))

    def _generate(
        self, rows: list[Row], seen: list[Row] | None = None, cache: Any = None, **options: Any
    ) -> Any:
        """`generate` for rows; the media of the rows `seen` are in the cache."""
        inputs = self.prompts.arguments(rows, seen)
        if cache is not None:
            options[self.prompts.cache_name] = cache
        return self.prompts.answer(inputs, STEPS, **options)

    def _against_none(
        self,
        rows: list[Row],
        seen: list[Row] | None = None,
        cache: Any = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> float:
        """The largest difference between decode steps and the same ids without a cache."""
        out = self._generate(rows, seen, cache, **options)
        start = self.prompts.width(rows)
        words = out.sequences[:, start:]  # assisted decoding may give more
        steps = torch.stack(list(out.logits), 1)[:, : words.shape[1]]
        return float((steps - self._without_cache(rows, words)).abs().max())

    def _without_cache(self, rows: list[Row], words: Tensor) -> Tensor:
        """Logits (B, T, V) that predict each of the words (B, T) after rows, without a cache."""
        inputs = self.prompts.arguments(self._continued(rows, words.tolist()))
        logits: Tensor = self.prompts.forward(inputs, use_cache=False).logits
        return logits[:, -words.shape[1] - 1 : -1].float()
