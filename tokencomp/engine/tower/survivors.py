"""Which tokens the stage in the vision tower has kept, read from the embeddings of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencomp.engine.rowmap import Chosen, KeptSpan, RowMap
from tokencomp.errors import SpanError
from tokencomp.plan.plan import Plan
from tokencomp.tokens.tokens import Kept


def surviving_rows(
    x: Tensor, row_map: RowMap, plan: Plan
) -> tuple[list[list[int]], Chosen, Kept | None]:
    """Read which tokens the tower stage has kept; returns the same as `choose`.

    Embeddings x (B, n, d) are NaN where the tower dropped a cell. Raises `SpanError` if their
    number differs from the plan, or if a question ends in a dropped token, so that no row predicts
    the next token.
    """
    alive = ~x.isnan().any(-1).cpu()  # the only synchronisation with the device
    real = row_map.mask(torch.device("cpu"))
    missing = int((~alive if real is None else ~alive & real).sum())
    counts, chosen, kept_rows, first = [], [], [], 0
    for b, spans in enumerate(row_map.spans):
        counts.append([0] * len(spans))
        for j, kept in enumerate(spans):
            present = alive[b, kept.start : kept.stop]
            _check_survivors(present, kept, plan, b)
            if not present[-1] and row_map.ends_question(b, kept):
                raise SpanError(
                    f"the question of sample {b} ends in the {kept.span.modality} at "
                    f"{kept.span.start}, whose last token the vision tower has dropped. Put "
                    "text after it, or use tower_ratio=0."
                )
            # What is left in the end are NaN outside of all spans.
            missing -= int((~present).sum())
            counts[b][j] = int(present.sum())
            if counts[b][j] < kept.count:
                chosen.append((b, j))
                kept_rows.append(present.nonzero()[:, 0] + first)
                first += kept.count
    if missing:
        raise SpanError(
            f"{missing} embeddings outside of the known images and videos are NaN. Pass all of "
            "input_ids, pixels and grids as the processor returns them."
        )
    return counts, chosen, Kept(torch.cat(kept_rows)) if kept_rows else None


def _check_survivors(present: Tensor, kept: KeptSpan, plan: Plan, sample: int) -> None:
    """Compare the number of present tokens of a span with the tower stage's count, if known."""
    if plan.tower is not None and plan.tower.decides:
        return
    count, expected = int(present.sum()), plan.entering(kept.span) + len(kept.span.text)
    if count == expected:
        return
    raise SpanError(
        f"the {kept.span.modality} at {kept.span.start} of sample {sample} has {count} of its "
        f"{len(present)} tokens, but the tower stage keeps {expected}. "
        "Features that were computed elsewhere, without the patch or under another tower_ratio, "
        "cannot be used: pass pixels, or use tower_ratio=0."
    )
