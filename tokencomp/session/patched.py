"""Checks of the patch of a session's model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokencomp.errors import OptionError
from tokencomp.handle import Handle
from tokencomp.plan.counts import budget_shares
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.tokens import MODALITIES, VisualSpan


def check_patch(handle: Handle | None, modalities: Tensor | None) -> None:
    """Refuse patches under which later parts would not equal one prompt, or could not be evicted.

    `modalities` are those of the next part, see `Adapter.modalities`; None for text.
    """
    if handle is None or not handle.compresses:
        return
    if handle.compact:
        raise OptionError(
            'the patch has positions="compact", which are counted again for every part. A session '
            'needs positions="original" (the default of patch).'
        )
    codes = [] if modalities is None else modalities.unique().tolist()
    names = [MODALITIES[code] for code in codes if code]
    for stage in handle.plan.stages:
        if names and stage.budget is not None and stage.budget.whole_prompt:
            raise OptionError(
                f'the patch has budget={{"prompt": {stage.budget.tokens}}}, so that the kept '
                "tokens of an image depend on the others of its prompt. A session compresses every "
                "part when it comes, and never again. Take one ratio or a budget per image: "
                "tokencomp.patch(model, budget=512). Older images are evicted by Session(..., "
                "budget=16_384)."
            )
        for signal in stage.reducer.needs if names else ():
            attends = isinstance(signal, Attention) and not signal.modalities.isdisjoint(names)
            if attends or signal.source == "query":
                raise OptionError(
                    f"reducer {stage.reducer.name!r} chooses visual tokens by the text after "
                    "them, and a session does not know the questions yet when it compresses. Take "
                    "one that reads the media alone: tokencomp.patch(model, ratio, "
                    "reducer='kcenter')."
                )


def rows_of(handle: Handle | None, spans: Sequence[VisualSpan], n: int, layers: int) -> int:
    """Rows that a part of `n` columns with these spans adds to the widest of `layers` layers."""
    if handle is None or not handle.compresses:
        return n
    plan, text = handle.plan, n - sum(span.visual for span in spans)
    if plan.entry is None:
        return text + sum(plan.entering(span) for span in spans)
    pairs = zip(spans, budget_shares(spans), strict=True)
    return text + sum(plan.counts(span, layers, share)[0] for span, share in pairs)
