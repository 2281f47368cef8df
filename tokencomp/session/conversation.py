"""One conversation on a KV cache: parts are appended, and rows are evicted down to a budget.

Only tensors; `tokencomp.session.session` has the processor and the chat template.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tokencomp.adapters.registry import adapter_for
from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.cache import first_layer, memory_of, physical_length
from tokencomp.engine.memory import Memory
from tokencomp.errors import OptionError, SessionError
from tokencomp.handle import handle_of
from tokencomp.session.evict import Mark, check_eviction, evict, held_columns
from tokencomp.session.held import POLICIES, TEXT, Held, PatchPlaces
from tokencomp.session.patched import check_patch, rows_of
from tokencomp.session.positions import Positions
from tokencomp.session.watch import read_media
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.validation import check_choice, fits

BY_TOKEN = ("input_ids", "mm_token_type_ids", "token_type_ids")


class Conversation:
    """The cache of one conversation, and its state; for the parameters see `Session`."""

    def __init__(self, model: nn.Module, budget: int | None, policy: str) -> None:
        check_choice("Session", "policy", policy, tuple(POLICIES))
        if budget is not None and (not fits(budget, int) or budget < 1):
            raise OptionError(
                f"Session: budget={budget!r}; allowed: a whole number of cache rows above 0, or "
                "None for no limit. Use e.g. budget=16_384."
            )
        self.adapter = adapter_for(model)
        if budget is not None:
            check_eviction(self.adapter)
        self.model, self.budget, self.policy = model, budget, policy
        self.positions = Positions(self.adapter)
        self.cache: Any = DynamicCache(config=self.adapter.config)
        self.tokens, self.items = 0, 0
        self._held: Held | None = None
        self._places = PatchPlaces()
        top = parameters_of(self.adapter.top)
        self._cache_name = "cache" if "cache" in top else "past_key_values"
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in top else {}

    @property
    def rows(self) -> int:
        """Rows in the widest layer."""
        layer = first_layer(self.cache)
        return 0 if layer is None or not layer.is_initialized else physical_length(layer)

    def mark(self) -> Callable[[], None]:
        """Returns a function that undoes later additions; no row may be evicted in between."""
        mark, values = Mark(self.cache), (self.tokens, self.items, self._held)
        following = self.positions.following

        def rewind() -> None:
            mark.rewind()
            self.tokens, self.items, self._held = values
            self.positions.following = following

        return rewind

    # -- parts ----------------------------------------------------------------------------------

    def add(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run one part of the conversation and append it; if that fails, nothing changes.

        `inputs` are arguments of the model: token ids (1, n), and pixels with their grids. Returns
        the logits after the last token, (1, vocabulary).
        """
        rewind = self.mark()
        try:
            return self.run(inputs)
        except BaseException:
            rewind()
            raise

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], kept: bool = True) -> Tensor:
        """`add` for callers of `mark`, which must rewind after an error.

        Text must fit into the budget if the part is `kept`; otherwise the caller rewinds.
        """
        samples, n = inputs["input_ids"].shape
        if samples != 1:
            raise SessionError(
                f"a session holds one conversation, and this part has {samples}. Open a "
                "session per conversation."
            )
        adapter, handle = self.adapter, handle_of(self.adapter.model)
        device = adapter.decoder.embed_tokens.weight.device
        inputs = {k: v.to(device) for k, v in inputs.items() if isinstance(v, Tensor)}
        modalities = adapter.modalities(inputs) if adapter.feature_modalities(inputs) else None
        check_patch(handle, modalities)
        if modalities is None and kept:
            self.check_text(n)
        positions, following = self.positions.of(inputs, modalities)
        shown = memory_of(self.cache)
        spans: list[VisualSpan] = []
        appearance = torch.zeros(n, 0)

        def read(found: list[VisualSpan], embeds: Tensor) -> None:
            nonlocal appearance
            rows = rows_of(handle, found, n, len(adapter.layers))
            self._check_room(rows, n, kept_text=False)
            spans.extend(found)
            if self.policy == "redundant":
                appearance = embeds[0].detach()

        reading: Any = contextlib.nullcontext()
        if modalities is not None:
            reading = read_media(adapter, inputs, modalities, positions, read)
        with reading:
            out = self.model(
                **inputs, **self._options, position_ids=positions, use_cache=True,
                **{self._cache_name: self.cache},
            )  # fmt: skip
        if self.budget is not None and kept:
            self._note(TEXT if modalities is None else self.items, spans, appearance, shown)
        self.positions.following, self.tokens = following, self.tokens + n
        self.items += modalities is not None
        logits: Tensor = out.logits[:, -1]
        return logits

    def _note(
        self, item: int, spans: Sequence[VisualSpan], appearance: Tensor, shown: Memory
    ) -> None:
        """Record item, place and appearance (n, d) of the new rows of the widest layer.

        `shown`: what the cache showed before. The item also shows rows that its pictures repeat.
        """
        layer = first_layer(self.cache)
        columns = held_columns(layer)[0]
        columns = columns[columns >= self.tokens]
        own, device = columns - self.tokens, columns.device
        places = self._places.of(spans, len(appearance)).to(device)
        items = torch.full_like(columns, item)
        new = Held(columns, items, places[own], appearance.to(device)[own])
        held = new if self._held is None else self._held.joined(new)
        rows = memory_of(self.cache).since(shown)
        self._held = replace(held, items=held.items.index_fill(0, rows.to(device), item))

    # -- limits ---------------------------------------------------------------------------------

    def shrink(self) -> int:
        """Evict rows of media down to the budget; returns how many."""
        if self.budget is None or self._held is None or len(self._held) <= self.budget:
            return 0
        held = self._held
        going = POLICIES[self.policy](held)[: len(held) - self.budget]
        left = evict(self.cache, held.columns[going])
        stays = torch.ones(len(held), dtype=torch.bool, device=going.device)
        stays[going] = False
        self._held = held.rows(stays)
        return left

    def check_text(self, tokens: int) -> None:
        """Raise `SessionError` if `tokens` more tokens of text do not fit into the budget."""
        self._check_room(tokens, tokens, kept_text=True)

    def _check_room(self, rows: int, tokens: int, kept_text: bool) -> None:
        budget = self.budget
        texts = 0 if self._held is None else int((self._held.items == TEXT).sum())
        if budget is None or texts + rows <= budget:
            return
        what = f"{tokens} tokens of text" if kept_text else f"a chunk of {tokens} tokens"
        after = "" if rows == tokens else f" ({rows} rows after compression)"
        fix = "append fewer or smaller frames at once, or raise the ratio of the patch"
        fix = "or open a new session" if kept_text else fix
        raise SessionError(
            f"{what}{after} and {texts} rows of text, which are always kept: more than "
            f"budget={budget}. Allowed are {max(0, budget - texts)} rows. Raise the budget, "
            f"{fix}. Nothing was added."
        )


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join several parts: token tensors along the sequence, pixels along the batch.

    Missing token types are 0 (text).
    """
    names = dict.fromkeys(name for part in parts for name in part)
    joined = {}
    for name in names:
        own = [part.get(name) for part in parts]
        known = [x for x in own if x is not None]
        if name in BY_TOKEN:
            zeros = [torch.zeros_like(part["input_ids"], dtype=known[0].dtype) for part in parts]
            known = [z if x is None else x for x, z in zip(own, zeros, strict=True)]
        joined[name] = torch.cat(known, 1 if name in BY_TOKEN else 0)
    return joined
