"""Projection of any number of frames to a fixed number of tokens by a trained projector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokencomp.context import Reduction, VisualSpan, VisualTokens
from tokencomp.errors import SpanError, WeightsError
from tokencomp.reducers.base import Reducer, register_reducer
from tokencomp.reducers.rows import finite, rewritten, split

if TYPE_CHECKING:
    from torch import nn

    from tokencomp.projectors.ccam import CCAMProjector

TRAIN = "tokencomp train ccam --model MODEL --data DATA --output FOLDER"


@lru_cache(maxsize=4)
def _load(path: Path, modified: int, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
    from tokencomp.projectors.ccam import CCAMProjector

    return CCAMProjector.load(path).to(device, dtype)


@register_reducer("ccam")
@dataclass(frozen=True)
class Ccam(Reducer):
    """Let Q learned queries read all frames, each the frames up to its own time (2408.14023).

    Always Q tokens per image or video, so `ratio` only switches it on; `handle.stats.ratio` says
    what it saves. Published as a projector from the vision tower trained together with the model;
    here it reads the model's own projected features and is trained on the frozen model (ours).
    Untrained queries mean nothing to a model, so there is no training-free form.

    Attributes
    ----------
    weights : str or None
        `ccam.safetensors`, or the folder that holds it. None: in the
        model's folder or its subfolder `tokencomp`.

    Raises
    ------
    WeightsError
        On `patch`: no weights, or weights of another model.
    SpanError
        An image or video with fewer tokens than the projector has queries.

    Notes
    -----
    The tokens stand at Q places spread evenly over the span and keep their positions. A span of
    exactly Q tokens is left as it is.
    """

    weights: str | None = None

    summary = "trained projector: always as many tokens, however many frames (2408.14023)"

    def __post_init__(self) -> None:
        if isinstance(self.weights, PathLike):  # text, so that options are ready for JSON
            object.__setattr__(self, "weights", fspath(self.weights))
        super().__post_init__()

    def for_model(self, model: nn.Module) -> Ccam:
        from tokencomp.weights import check_card, locate, read

        path = locate(self.weights, model, "ccam", TRAIN)
        check_card(read(path)[1], model, path, TRAIN)
        return Ccam(weights=str(path))

    def projector(self, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
        """The trained module, loaded once per device and dtype."""
        if self.weights is None:
            raise WeightsError(f"reducer='ccam' needs trained weights. Train them with `{TRAIN}`.")
        path = Path(self.weights)
        if not path.is_file():
            raise WeightsError(f"{path} does not exist. Train a ccam projector: {TRAIN}")
        return _load(path.resolve(), path.stat().st_mtime_ns, device, dtype)

    def queries(self) -> int:
        """Tokens per image or video."""
        return self.projector(torch.device("cpu"), torch.float32).config.queries

    def span_count(self, span: VisualSpan, fraction: float) -> int:
        wanted = self.queries() + len(span.special)
        if span.visual < wanted:
            raise SpanError(
                f"{span.kind} of {span.visual} visual tokens: smaller than the {wanted} that "
                "the ccam projector makes of it. Use larger media, or a projector with fewer "
                "queries."
            )
        return wanted

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        patches, special = split(tokens)
        x = tokens.features[patches][None]
        finite(x.norm(dim=-1), "feature norms")
        module = self.projector(x.device, x.dtype)
        made = module(x, tokens.grid[0], tokens.grid[1:])[0]
        if keep - special.numel() != len(made):
            raise SpanError(
                f"{keep - special.numel()} tokens were asked of a ccam projector that makes "
                f"{len(made)}."
            )
        step = torch.arange(len(made), device=x.device)
        places = patches[(2 * step + 1) * patches.numel() // (2 * len(made))]
        sizes = torch.full((len(made),), patches.numel() / len(made), device=x.device)
        return rewritten(tokens, places, made, sizes)
