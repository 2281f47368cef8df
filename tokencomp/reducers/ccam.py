"""CCAM: a trained projector to a fixed number of tokens (arXiv 2408.14023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokencomp.errors import SpanError, WeightsError
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, finite_features, register_reducer
from tokencomp.tokens.stacks import grouped
from tokencomp.tokens.tokens import ModelFacts, VisualSpan, evenly

if TYPE_CHECKING:
    from tokencomp.trained.ccam import CCAMProjector

TRAIN = "tokencomp train ccam --model MODEL --data DATA --output FOLDER"
Stamp = tuple[int, ...]
"""Modification times of the files of a projector, in nanoseconds."""


@lru_cache(maxsize=4)
def _load(path: Path, stamp: Stamp, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
    from tokencomp.trained.ccam import CCAMProjector

    return CCAMProjector.load(path).to(device, dtype)


@lru_cache(maxsize=64)
def _queries(path: Path, stamp: Stamp) -> int:
    from tokencomp.trained.ccam import read_card

    return read_card(path)[1].queries


@register_reducer("ccam")
@dataclass(frozen=True)
class Ccam(Reducer):
    """Q learned queries read all frames by causal cross-attention (CCAM, arXiv 2408.14023).

        y_i = CrossAttention(query_i, {x of frames that query i sees}),  i = 1 … Q

    Which frames a query sees is the published rule, `tokencomp.kernels.visible_frames`. Every image
    or video becomes Q tokens, so `ratio` only switches the reducer on: the plan and the handle show
    the requested ratio, `handle.stats.ratio` the achieved one.

    Deviations from the paper:

    - Its projector reads the vision tower and is trained together with the model; this one reads
      projected features and is trained with the model frozen (ours).
    - The Q tokens get the positions of Q evenly spaced tokens of the span. A span of Q tokens is
      not changed.

    There is no training-free form. With more frames than queries, no query sees the last frames:
    take more queries, or train with `--no-causal`.

    Attributes
    ----------
    weights : str or None
        `ccam.safetensors`, or the folder that holds it. None: in the model's folder or its
        subfolder `tokencomp`.

    Raises
    ------
    WeightsError
        On `patch`: weights that are missing, damaged, or of another model.
    SpanError
        An image or video with fewer tokens than the projector has queries.
    """

    weights: str | None = None

    summary = "trained projector: always as many tokens, however many frames (2408.14023)"
    traits = Traits(merges=True, grid="whole", batched=True, entry_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.weights, PathLike):  # text, so that options are ready for JSON
            object.__setattr__(self, "weights", fspath(self.weights))
        super().__post_init__()

    def bind(self, facts: ModelFacts) -> Ccam:
        from tokencomp.trained.cards import check_card, locate
        from tokencomp.trained.ccam import read_card

        path = locate(self.weights, facts, "ccam", TRAIN).absolute()
        check_card(read_card(path)[0], facts, path, TRAIN)
        bound = Ccam(str(path))
        bound.projector(facts.device, facts.dtype)
        return bound

    def projector(self, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
        """The trained module, loaded once per device and dtype."""
        return _load(*self._files, device, dtype)

    def queries(self) -> int:
        """Tokens per image or video."""
        return _queries(*self._files)

    @cached_property
    def _files(self) -> tuple[Path, Stamp]:
        """The weights file, and the modification times of it and its card."""
        if self.weights is None:
            raise WeightsError(f"reducer='ccam' needs trained weights. Train them with `{TRAIN}`.")
        path = Path(self.weights).absolute()
        try:
            files = (path, path.with_suffix(".json"))
            return path, tuple(file.stat().st_mtime_ns for file in files)
        except OSError as error:
            raise WeightsError(f"{error}. Train a ccam projector: {TRAIN}") from error

    def keep_count(self, span: VisualSpan, fraction: float) -> int:
        count = self.queries() + len(span.special)
        if span.visual < count:
            raise SpanError(
                f"{span.modality} of {span.visual} visual tokens, but the ccam projector makes "
                f"{count} of it. Use larger media, or a projector with fewer queries."
            )
        return count

    def reduce(self, tokens: Tokens) -> Kept:
        x = finite_features(tokens.features)
        projector = self.projector(x.device, x.dtype)
        parts, chosen, sizes = [], [], []
        for grid, members in grouped(tokens.grids).items():
            # Spans of one grid run through the projector together.
            cells = grid[0] * grid[1] * grid[2]
            starts = [tokens.starts[m] for m in members]
            rows = tokens.table(np.add.outer(starts, np.arange(cells)).ravel())
            stack = x.index_select(0, rows).view(len(members), cells, -1)
            projected = projector(stack, grid[0], grid[1:])
            count = projected.shape[1]
            # Output tokens take the positions of evenly spaced patches.
            parts.append(projected.flatten(0, 1))
            chosen.append(np.add.outer(starts, evenly(cells, count)).ravel())
            sizes.append(np.full(len(members) * count, cells / count, dtype=np.float32))
        size = torch.from_numpy(np.concatenate(sizes)).to(x.device)
        return Kept.ascending(tokens.table(np.concatenate(chosen)), torch.cat(parts), size)
