"""One conversation on a KV cache: parts are appended, and rows are evicted down to a budget.

Only tensors; `tokencomp.session.session` has the processor and the chat template.
"""

from __future__ import annotations

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
from tokencomp.session.watch import Watch
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.validation import check_choice, fits

BY_TOKEN = ("input_ids", "mm_token_type_ids", "token_type_ids")


class Conversation:
    """The cache of one conversation, and its state.

    Parameters
    ----------
    model
        A multimodal model, patched or not.
    budget
        Number of rows that the widest layer keeps between calls; None: all.
    policy
        Which rows of media are evicted first, see `tokencomp.session.held`.
    """

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

    @property
    def texts(self) -> int:
        """Number of rows that are never evicted."""
        return 0 if self._held is None else self._held.texts

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

        Parameters
        ----------
        inputs
            Arguments of the model by name: token ids (1, n), and pixels with their grids.

        Returns
        -------
        Tensor, shape (1, vocabulary)
            Logits after the last token.
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
        ids = inputs["input_ids"]
        if ids.shape[0] != 1:
            raise SessionError(
                f"a session holds one conversation, and this part has {ids.shape[0]}. Open a "
                "session per conversation."
            )
        device = self.adapter.decoder.embed_tokens.weight.device
        inputs = {k: v.to(device) for k, v in inputs.items() if isinstance(v, Tensor)}
        modalities = (
            self.adapter.modalities(inputs) if self.adapter.feature_modalities(inputs) else None
        )
        handle = handle_of(self.adapter.model)
        check_patch(handle, modalities)
        if modalities is None and kept:
            self.check_text(ids.shape[1])
        positions, following = self.positions.of(inputs, modalities)
        shown = memory_of(self.cache)
        appearance = self.budget is not None and self.policy == "redundant"
        watch = Watch(self.adapter, inputs, modalities, positions, self.check_chunk, appearance)
        with watch:
            out = self.model(
                **inputs, **self._options, position_ids=positions, use_cache=True,
                **{self._cache_name: self.cache},
            )  # fmt: skip
        n = ids.shape[1]
        if self.budget is not None and kept:
            self._note(n, watch, shown)
        self.positions.following, self.tokens = following, self.tokens + n
        self.items += modalities is not None
        logits: Tensor = out.logits[:, -1]
        return logits

    def _note(self, n: int, watch: Watch, shown: Memory) -> None:
        """Record items and places of the new rows of the widest layer.

        `shown`: what the cache showed before. The item also shows rows that its pictures repeat.
        """
        layer = first_layer(self.cache)
        columns = held_columns(layer)[0]
        columns = columns[columns >= self.tokens]
        own, device = columns - self.tokens, columns.device
        item = TEXT if watch.spans is None else self.items
        places = self._places.of(watch.spans or [], n).to(device)
        appearance = torch.zeros(len(own), 0, device=device)
        if watch.appearance is not None:
            appearance = watch.appearance.to(device)[own]
        new = Held(columns, torch.full_like(columns, item), places[own], appearance)
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
        if budget is None or self.texts + rows <= budget:
            return
        what = f"{tokens} tokens of text" if kept_text else f"a chunk of {tokens} tokens"
        after = "" if rows == tokens else f" ({rows} rows after compression)"
        fix = (
            "or open a new session"
            if kept_text
            else "append fewer or smaller frames at once, or raise the ratio of the patch"
        )
        raise SessionError(
            f"{what}{after} and {self.texts} rows of text, which are always kept: more than "
            f"budget={budget}. Allowed are {max(0, budget - self.texts)} rows. Raise the budget, "
            f"{fix}. Nothing was added."
        )

    def check_chunk(self, spans: Sequence[VisualSpan], n: int) -> None:
        """Raise `SessionError` if media in `n` columns that are about to run do not fit."""
        handle = handle_of(self.adapter.model)
        rows = rows_of(handle, spans, n, len(self.adapter.layers))
        self._check_room(rows, n, kept_text=False)


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join several parts: token tensors along the sequence, pixels along the batch.

    Missing token types are 0 (text).
    """
    names = dict.fromkeys(name for part in parts for name in part)
    joined = {}
    for name in names:
        own = [part.get(name) for part in parts]
        if name in BY_TOKEN:
            known = next(x for x in own if x is not None)
            zeros = [torch.zeros_like(part["input_ids"]).to(known.dtype) for part in parts]
            joined[name] = torch.cat(
                [z if x is None else x for x, z in zip(own, zeros, strict=True)], 1
            )
        else:
            joined[name] = torch.cat([x for x in own if x is not None])
    return joined
