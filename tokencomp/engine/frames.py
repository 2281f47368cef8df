"""The signal `FRAMES`: the frame before every picture of a call, for reducers that compare them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.engine.call import Call
from tokencomp.engine.memory import Entered
from tokencomp.plan.counts import budget_shares
from tokencomp.tokens.signals import FRAMES


def frames_before(call: Call, x: Tensor) -> list[list[Tensor | None]]:
    """The latest frame of the same shape before every span, of its prompt or an earlier turn.

    Per sample and span (height · width, d), or None if there is none. x (B, n, d) is the input of
    the first decoder layer, for all tokens. The call gets the last frame of every span, for the
    memory of its cache.
    """
    found, unknown = [], set()
    for b, known in enumerate(call.memory.of(len(call.map.spans))):
        frames = []
        for prompt in call.map.prompts[b]:  # packed prompts do not see each other's frames
            latest: dict[Any, Tensor | None] = {}
            row = call.map.spans_of(b, prompt)
            # Tiles of one picture are compared tile by tile: part 2 with part 2 of the one before.
            for kept, share in zip(row, budget_shares([k.span for k in row]), strict=True):
                span, (_, h, w) = kept.span, kept.span.grid
                key = (FRAMES, span.modality, h, w, share.part)
                if key not in latest:
                    latest[key] = known[key].known() if key in known else None
                frames.append(latest[key])
                # The tower has dropped tokens, or no grid: later pictures have nothing to be
                # compared with.
                if not (kept.whole and span.grid_known):
                    unknown.add(span.modality)
                    latest[key] = None
                    continue
                patches = np.flatnonzero(~span.fixed_mask())[None, -h * w :]
                rows = torch.from_numpy(kept.start + patches[0]).to(x.device)
                latest[key] = frame = x[b, rows].detach()
                place = (span.start, span.stop)
                call.entered.append(Entered(b, key, span.start + patches, frame, place))
        found.append(frames)
    call.compared |= {(FRAMES, modality) for modality in call.modalities - unknown}
    return found
