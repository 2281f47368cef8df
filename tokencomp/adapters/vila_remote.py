"""Models of the VILA and NVILA checkpoints' own remote code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.call import Call
from tokencomp.adapters.structure import Parts
from tokencomp.adapters.towers.base import unknown_cells
from tokencomp.adapters.towers.dense import DenseTower
from tokencomp.errors import SpanError
from tokencomp.tokens.spans import VisualSpan
from tokencomp.torchlib.replace import Hooked, MethodReplacement


@dataclass
class _Media:
    """One encoded image or video: its embeddings (n, d), and its layout."""

    embeds: Tensor
    grid: tuple[int, int, int]
    kind: str
    special: tuple[int, ...]


class _Recorded(threading.local):
    """What the latest call of `_embed` in this thread recorded for the prefill that follows."""

    def __init__(self) -> None:
        self.media: dict[str, list[_Media]] = {}
        self.embeds: Tensor | None = None
        self.spans: list[list[VisualSpan]] = []


class VilaPortAdapter(Adapter, Hooked):
    """A model of the remote code: `_embed` splices media and pads; `llm` does the rest.

    When the language model is called, the placeholders are gone. The adapter therefore records
    what the encoders return, locates it in the output of `_embed`, and matches that output with
    the next prefill of `llm`.
    """

    family = "VILA (remote code)"

    def tower_layout(self) -> DenseTower:
        raise unknown_cells(self.family, "its code finds features by comparing them")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._recorded = _Recorded()

    @property
    def media(self) -> set[str]:
        return {"image", "video"}

    def find_parts(self, model: Any) -> Parts:
        return Parts(model.llm, model.llm, model.llm.model)

    # -- recording ------------------------------------------------------------------------------

    def install(self) -> None:
        self.uninstall()
        for kind, encoder in self.model.encoders.items():
            hook = self._record(kind)
            self._handles.append(encoder.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(MethodReplacement(self.model, "_embed", self._embed))

    def uninstall(self) -> None:
        self.remove()
        self._recorded = _Recorded()

    def _record(self, kind: str) -> Any:
        def hook(encoder: nn.Module, args: Any, kwargs: Any, out: list[Tensor]) -> None:
            media = args[0] if args else next(iter(kwargs.values()))
            ends = tuple(self._ids(getattr(encoder, f"{e}_tokens", None)) for e in ("start", "end"))
            self._recorded.media[kind] = [
                _layout(features.detach(), kind, pixels.shape[0] if kind == "video" else 1, ends)
                for pixels, features in zip(media, out, strict=True)
            ]

        return hook

    def _ids(self, text: str | None) -> int:
        return len(self.model.tokenizer(text).input_ids) if text else 0

    def _embed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `model._embed`, which this replaces while patched, and record the spans."""
        recorded = self._recorded
        recorded.media = {}
        out = original(*args, **kwargs)
        recorded.embeds = out[0]
        pending = {kind: list(media) for kind, media in recorded.media.items()}
        recorded.spans = [_spans_in_row(row, pending) for row in out[0]]
        left = sum(map(len, pending.values()))
        if left:
            recorded.embeds = None
            raise SpanError(
                f"{left} encoded images or videos are not in the embeddings of the prompt. Was the "
                "prompt truncated, or does something else change the media embeddings?"
            )
        return out

    # -- reading --------------------------------------------------------------------------------

    def carries_features(self, inputs: Mapping[str, Any]) -> bool:
        embeds = inputs.get("inputs_embeds")
        return embeds is not None and self._copies(embeds) > 0 and any(self._recorded.spans)

    def hides_features(self, inputs: Mapping[str, Any]) -> bool:
        embeds = inputs.get("inputs_embeds")
        return embeds is not None and self._copies(embeds) == 0

    def _copies(self, embeds: Tensor) -> int:
        """How often beam search repeats the rows of the recorded prompt; 0: another prompt."""
        recorded = self._recorded.embeds
        if (
            recorded is None
            or embeds.shape[1:] != recorded.shape[1:]
            or len(embeds) % len(recorded)
        ):
            return 0
        copies = len(embeds) // len(recorded)
        same = torch.equal(embeds[::copies], recorded.to(embeds))
        return copies if same else 0

    def kinds(self, inputs: Mapping[str, Any]) -> Tensor | None:
        if not self.carries_features(inputs):
            return None
        embeds = inputs["inputs_embeds"]
        kinds = torch.zeros(embeds.shape[:2], dtype=torch.int8)
        for row, spans in enumerate(self._rows(embeds)):
            for span in spans:
                kinds[row, span.start : span.stop] = 2 if span.kind == "video" else 1
        return kinds

    def _rows(self, embeds: Tensor) -> list[list[VisualSpan]]:
        copies = self._copies(embeds)
        return [spans for spans in self._recorded.spans for _ in range(copies)]

    def spans(self, call: Call) -> list[list[VisualSpan]]:
        return self._rows(call.inputs["inputs_embeds"])


def _layout(features: Tensor, kind: str, frames: int, ends: tuple[int, ...]) -> _Media:
    """Grid and separators of one medium: `frames` squares, each between its end tokens."""
    before, after = ends
    per_frame, rest = divmod(len(features), frames)
    patches = per_frame - before - after
    side = round(max(patches, 0) ** 0.5)
    if rest or side == 0 or side * side != patches:
        raise SpanError(
            f"{kind} of {len(features)} embeddings: no {frames} squares with {before} + {after} "
            "separators each. Multi-scale (dynamic_s2) and pooling encoders are not supported. "
            "Use a checkpoint with fixed squares."
        )
    special = [
        i * per_frame + j
        for i in range(frames)
        for j in range(per_frame)
        if j < before or j >= per_frame - after
    ]
    return _Media(features, (frames, side, side), kind, tuple(special))


def _spans_in_row(row: Tensor, pending: dict[str, list[_Media]]) -> list[VisualSpan]:
    """Spans of one prompt (L, d); media that stand in it are removed from `pending`."""
    spans: list[VisualSpan] = []
    cursor = 0
    while True:
        starts = []
        for kind, media in pending.items():
            start = _first_column(row, media[0].embeds, cursor) if media else -1
            if start >= 0:
                starts.append((start, kind))
        if not starts:
            return spans
        start, kind = min(starts)
        item = pending[kind].pop(0)
        n = len(item.embeds)
        what: Any = "video" if item.kind == "video" else "image"
        spans.append(VisualSpan(start, n, item.grid, what, special=item.special))
        cursor = start + n


def _first_column(row: Tensor, embeds: Tensor, cursor: int) -> int:
    """First column from `cursor` on where `embeds` (n, d) stands in `row` (L, d), or -1."""
    embeds = embeds.to(row)
    starts = (row[cursor:] == embeds[0]).all(-1).nonzero()[:, 0] + cursor
    start: int
    for start in starts.tolist():
        if torch.equal(row[start : start + len(embeds)], embeds):
            return start
    return -1
