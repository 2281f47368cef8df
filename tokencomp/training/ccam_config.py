"""Options of `tokencomp train ccam`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokencomp.adapters.registry import adapter_for
from tokencomp.trained.ccam_config import ProjectorConfig
from tokencomp.training.loop import LoopConfig


@dataclass(frozen=True)
class CcamConfig(LoopConfig):
    """Options of the training of a projector, beside those of the loop.

    Attributes
    ----------
    queries, width, heads, mlp, causal, spatial
        Of the projector; 0 takes the model's hidden size (width), its heads, and twice the width
        (mlp).
    align
        Number of first steps that train every query to return the mean of its share of a single
        frame, so that the frozen model can read the queries from the start (ours).
    """

    queries: int = 32
    width: int = 0
    heads: int = 0
    mlp: int = 0
    causal: bool = True
    spatial: bool = True
    align: int = 200

    def sizes(self, model: Any) -> ProjectorConfig:
        """The projector for `model`."""
        config = adapter_for(model).text_config
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        width = self.width or hidden
        sizes = (self.queries, width, self.heads or heads, self.mlp or 2 * width, hidden, hidden)
        return ProjectorConfig(*sizes, causal=self.causal, spatial=self.spatial)
