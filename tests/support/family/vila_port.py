"""A stand-in of the shape of VILA's published remote code: `_embed`, `encoders`, `llm`.

It shares its parts with a `VilaForConditionalGeneration`, and takes one placeholder per medium.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from support.family.vila import NEWLINE


class Encoder(nn.Module):
    """Features of each medium, "\\n" after each image or frame."""

    def __init__(self, parent: Any, start: str | None = None) -> None:
        super().__init__()
        self._parent = [parent]
        self.start_tokens, self.end_tokens = start, "\n"

    def forward(self, media: list[Tensor], config: dict[str, Any]) -> list[Tensor]:
        parent, out = self._parent[0], []
        newline = parent.llm.model.embed_tokens(torch.tensor([NEWLINE]))
        for item in media:
            frames = item if item.ndim == 4 else item[None]
            rows = [torch.cat([f, newline]) for f in parent.vila.encode_images(frames)]
            out.append(torch.cat(rows))
        return out


class VilaPort(nn.Module):
    def __init__(self, vila: Any, image: int, video: int) -> None:
        super().__init__()
        self.vila, self.llm = vila, vila.llm
        self.config = SimpleNamespace(model_type="vila")
        self.tokens = {image: "image", video: "video"}
        self.encoders = {"image": Encoder(self), "video": Encoder(self)}

    def tokenizer(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[NEWLINE] * len(text))

    def _embed(
        self, ids: Tensor, media: Any, config: Any, labels: Any, mask: Tensor
    ) -> tuple[Tensor, None, Tensor]:
        """Splice, then pad on the left."""
        encoded = {name: self.encoders[name](items, config) for name, items in media.items()}
        rows = []
        for row, valid in zip(ids, mask.bool(), strict=True):
            parts = []
            for token in row[valid].tolist():
                name = self.tokens.get(token)
                if name:
                    parts.append(encoded[name].pop(0))
                else:
                    parts.append(self.llm.model.embed_tokens(torch.tensor([token])))
            rows.append(torch.cat(parts))
        width = max(map(len, rows))
        embeds = torch.stack([nn.functional.pad(r, (0, 0, width - len(r), 0)) for r in rows])
        seen = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]).bool()
        return embeds, None, seen

    def forward(self, ids: Tensor, media: Any, mask: Tensor, **kwargs: Any) -> Any:
        embeds, _, seen = self._embed(ids, media, None, None, mask)
        return self.llm(inputs_embeds=embeds, attention_mask=seen, **kwargs)

    def generate(self, ids: Tensor, media: Any, mask: Tensor, **kwargs: Any) -> Tensor:
        embeds, _, seen = self._embed(ids, media, {}, None, mask)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=seen, **kwargs)
