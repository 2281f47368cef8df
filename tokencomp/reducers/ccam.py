"""CCAM: a trained projector to a fixed number of tokens (arXiv 2408.14023)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokencomp.errors import SpanError
from tokencomp.reducers import Kept, Tokens, Traits, finite_features, register_reducer
from tokencomp.reducers._trained import Card, TrainedReducer, moved
from tokencomp.tokens.stacks import grouped
from tokencomp.tokens.tokens import VisualSpan, evenly

if TYPE_CHECKING:
    from tokencomp.trained.ccam import CCAMProjector

TRAIN = "tokencomp train ccam --model MODEL --data DATA --output FOLDER"


@register_reducer("ccam")
@dataclass(frozen=True)
class Ccam(TrainedReducer):
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

    summary = "trained projector: always as many tokens, however many frames (2408.14023)"
    traits = Traits(merges=True, grid="whole", batched=True, entry_only=True)
    train = TRAIN

    @classmethod
    def module_of(cls, card: Card, path: Path) -> CCAMProjector:
        from tokencomp.trained.ccam import CCAMProjector, ProjectorConfig

        return CCAMProjector(ProjectorConfig(**card["ccam"]))

    def projector(self, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
        """The trained module, copied once per device and dtype."""
        projector: CCAMProjector = moved(self._module, device, dtype)
        return projector

    def queries(self) -> int:
        """Tokens per image or video."""
        return int(self._module.config.queries)

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
