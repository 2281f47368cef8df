"""The default: another method for every modality (ours)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers.condiv import ConDiv
from tokencomp.reducers.kcenter import KCenter
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.signals import Attention


@register_reducer("auto")
@dataclass(frozen=True, repr=False)
class Auto(Reducer):
    """`kcenter` on images, `condiv` on videos, and `uniform` on audio.

    - Images: early layers attend more to the end of an image (arXiv 2412.13180), so attention is
      not used, and prompts without videos need no scores.
    - Videos: what is shown again looks like what is kept already, so that the attention of the
      question has to vouch for it.
    - Audio: tokens that look alike carry duration and count, which choosing by distance would lose.

    As the default of `patch` it also merges in images, `merge="auto"`. It was chosen on validation
    questions: docs/decisions/0001-default-reducer.md.
    """

    by_modality: ClassVar[dict[str, KCenter | ConDiv | Uniform]] = {
        "image": KCenter(),
        "video": ConDiv(),
        "audio": Uniform(),
    }
    needs = frozenset({Attention("text", modalities=frozenset({"video"}))})
    traits = Traits(batched=True)
    summary = "the default: kcenter on images, condiv on videos, uniform on audio"

    def __repr__(self) -> str:
        return f"Auto({', '.join(f'{name}={value!r}' for name, value in self.by_modality.items())})"

    def reduce(self, tokens: Tokens) -> Kept:
        modalities, rows = list(dict.fromkeys(tokens.modalities)), []
        if len(modalities) == 1:
            return self.by_modality[modalities[0]].reduce(tokens)
        for modality in modalities:
            # Spans of other modalities have the budget 0.
            pairs = zip(tokens.budgets, tokens.modalities, strict=True)
            part = replace(tokens, budgets=[n if m == modality else 0 for n, m in pairs])
            rows.append(self.by_modality[modality].reduce(part).patches)
        return Kept(torch.cat(rows).sort().values)
