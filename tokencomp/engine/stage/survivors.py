"""Which visual tokens of a prompt the vision tower has computed; the others are NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencomp.engine.rows.compaction import Selection
from tokencomp.engine.rows.layout import KeptSpan, RowLayout
from tokencomp.errors import SpanError
from tokencomp.plan.plan import Plan
from tokencomp.tokens.reduction import Reduction


def surviving_rows(x: Tensor, layout: RowLayout, plan: Plan) -> Selection:
    """What the tower stage of `plan` has left of every live span, its special tokens and text too.

    The embeddings x (B, n, d) are NaN where the tower computed nothing. Refused are other tokens
    than the stage leaves out; and a question that ends in such a token, so that there is no column
    that the next token could be predicted from.
    """
    alive = ~x.isnan().any(-1).cpu()  # the only time that the host waits for the device
    real = layout.valid(torch.device("cpu"))
    missing = int((~alive if real is None else ~alive & real).sum())
    counts, chosen, rows, first = [], [], [], 0
    for b, row in enumerate(layout.spans):
        counts.append([0] * len(row))
        for j, live in enumerate(row):
            present = alive[b, live.start : live.stop]
            _check(present, live, plan, b)
            if not present[-1] and layout.ends_question(b, live):
                raise SpanError(
                    f"the question of sample {b} ends in the {live.span.modality} at "
                    f"{live.span.start}, whose last token the vision tower has dropped. Put "
                    "text behind it, or use tower_ratio=0."
                )
            missing -= int((~present).sum())
            counts[b][j] = int(present.sum())
            if counts[b][j] < live.count:
                chosen.append((b, j))
                rows.append(present.nonzero()[:, 0] + first)
                first += live.count
    if missing:
        raise SpanError(
            f"{missing} embeddings outside of the known images and videos are NaN. Pass all of "
            "input_ids, pixels and grids as the processor returns them."
        )
    return Selection(counts, chosen, Reduction(torch.cat(rows)) if rows else None)


def _check(present: Tensor, live: KeptSpan, plan: Plan, sample: int) -> None:
    """Compare the tokens that are left of a span with the count of the tower stage."""
    count, expected = int(present.sum()), plan.entering(live.span) + len(live.span.text)
    if count == expected:
        return
    dropped = plan.tower.fraction if plan.tower else 1.0
    raise SpanError(
        f"the {live.span.modality} at {live.span.start} of sample {sample} has {count} of its "
        f"{len(present)} tokens, but the tower stage, which keeps {dropped:g}, leaves {expected}. "
        "Features that were computed elsewhere, without the patch or under another tower_ratio, "
        "cannot be used: pass pixels, or use tower_ratio=0."
    )


def refuse_missing(x: Tensor) -> None:
    """Refuse embeddings (B, n, d) of a call without a tower stage, if tokens are missing.

    A stage in the vision tower has dropped tokens that would now stay in the prompt.
    """
    missing = int(x.isnan().any(-1).sum())
    if missing:
        raise SpanError(
            f"{missing} visual tokens were dropped in the vision tower, but this prompt runs "
            "without a tower stage (the handle is disabled or has changed since, or the places of "
            "features are unknown). Encode and read the media under the same setting: pass pixels."
        )
