"""The default: one method for what is seen, another for what is heard (ours)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers.kcenter import KCenter
from tokencomp.reducers.uniform import Uniform


@register_reducer("auto")
@dataclass(frozen=True, repr=False)
class Auto(Reducer):
    """`kcenter` on images and videos, and `uniform` on audio.

    - Images and videos: early layers attend more to the end of an image (arXiv 2412.13180), and a
      long answer needs what its question does not name, so attention is not used.
    - Audio: tokens that look alike carry duration and count, which choosing by distance would lose.

    As the default of `patch` it also merges in videos and images, `merge="auto"`. It was chosen on
    validation questions: docs/decisions/0001-default-reducer.md.
    """

    by_modality: ClassVar[dict[str, KCenter | Uniform]] = {
        "image": KCenter(),
        "video": KCenter(),
        "audio": Uniform(),
    }
    traits = Traits(batched=True)
    summary = "the default: kcenter on images and videos, uniform on audio"

    def __repr__(self) -> str:
        return f"Auto({', '.join(f'{name}={value!r}' for name, value in self.by_modality.items())})"

    def reduce(self, tokens: Tokens) -> Kept:
        reducers = list(dict.fromkeys(self.by_modality[m] for m in tokens.modalities))
        if len(reducers) == 1:
            return reducers[0].reduce(tokens)
        rows = []
        for reducer in reducers:
            # Spans of the other reducer have the budget 0.
            pairs = zip(tokens.budgets, tokens.modalities, strict=True)
            budgets = [n if self.by_modality[m] == reducer else 0 for n, m in pairs]
            rows.append(reducer.reduce(replace(tokens, budgets=budgets)).patches)
        return Kept(torch.cat(rows).sort().values)
