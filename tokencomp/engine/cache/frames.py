"""The last frames that a conversation has shown, for reducers that compare new ones with them.

They go with the cache, so that they belong to one conversation, and its copy has them too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokencomp.engine.rows.layout import RowLayout

ATTRIBUTE = "_tokencomp_frames"
Shape = tuple[str, int, int, int]  # kind, height, width, number of the span in its item


def compared_frames(x: Tensor, layout: RowLayout, cache: Any) -> list[list[Tensor | None]]:
    """The last frame of the same shape before every span; the cache then has the latest ones.

    Parameters
    ----------
    x : Tensor, shape (B, n, d)
        Input of the first decoder layer, of all tokens of the call.
    layout
        Where they stand.
    cache
        The KV cache of the call, or None: nothing is known of earlier calls then.

    Returns
    -------
    list per sample of list per span of Tensor, shape (height · width, d), or None
        None where no frame of this shape came before.
    """
    known: list[dict[Shape, Tensor]] = getattr(cache, ATTRIBUTE, None) or []
    if len(known) != len(layout.spans):  # another batch
        known = [{} for _ in layout.spans]
    found, latest = [], [dict(own) for own in known]
    for b, row in enumerate(layout.spans):
        frames, part, item = [], 0, None
        for live in row:
            part, item = (part + 1 if live.span.item == item else 0), live.span.item
            _, h, w = live.span.grid
            shape = (live.span.modality, h, w, part)
            frames.append(latest[b].get(shape))
            if live.whole and live.span.grid_known:
                patches = (~live.span.special_mask()).nonzero()[-h * w :, 0]
                latest[b][shape] = x[b, live.start + patches.to(x.device)].detach()
        found.append(frames)
    if cache is not None:
        setattr(cache, ATTRIBUTE, latest)
    return found
