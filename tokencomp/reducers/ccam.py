"""Projection of any number of frames to a fixed number of tokens by a trained projector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from tokencomp.errors import SpanError, WeightsError
from tokencomp.reducers._rows import finite_rows, rewritten, whole_grid
from tokencomp.reducers.base import Reducer, register_reducer
from tokencomp.tokens import Reduction, VisualSpan, VisualTokens

if TYPE_CHECKING:
    from torch import nn

    from tokencomp.trained.ccam import CCAMProjector

TRAIN = "tokencomp train ccam --model MODEL --data DATA --output FOLDER"
Stamp = tuple[int, ...]
"""When the files of a projector were written."""


@lru_cache(maxsize=4)
def _load(path: Path, stamp: Stamp, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
    from tokencomp.trained.ccam import CCAMProjector

    return CCAMProjector.load(path).to(device, dtype)


@lru_cache(maxsize=64)
def _queries(path: Path, stamp: Stamp) -> int:
    from tokencomp.trained.ccam_config import read_card

    return read_card(path)[1].queries


@register_reducer("ccam")
@dataclass(frozen=True)
class Ccam(Reducer):
    """Let Q learned queries read all frames, each the frames up to its own time (2408.14023).

    Always Q tokens per image or video, so `ratio` only switches it on: plan and handle show what
    was asked for, `handle.stats.ratio` what it saves. Published as a projector from the vision
    tower trained together with the model; here it reads the model's own projected features and is
    trained on the frozen model (ours). Untrained queries mean nothing to a model, so there is no
    training-free form.

    Attributes
    ----------
    weights : str or None
        `ccam.safetensors`, or the folder that holds it. None: in the
        model's folder or its subfolder `tokencomp`.

    Raises
    ------
    WeightsError
        On `patch`: no weights, broken ones, or those of another model.
    SpanError
        An image or video with fewer tokens than the projector has queries.

    Notes
    -----
    The tokens stand at Q places spread evenly over the span and keep their positions. A span of
    exactly Q tokens is left as it is. With more frames than queries, trailing frames are seen by
    no query (the published rule, see `tokencomp.kernels.visible_frames`): take more queries, or
    train with `--no-causal`. Video-CCAM's own projector is
    `tokencomp.trained.ccam.CCAMProjector.preset("video-ccam-7b-v1.2")`.
    """

    weights: str | None = None

    _found: ClassVar[tuple[Path, Stamp] | None] = None  # the files as they were on `patch`
    summary = "trained projector: always as many tokens, however many frames (2408.14023)"
    whole_spans = True
    own_count = True
    entry_only = True

    def __post_init__(self) -> None:
        if isinstance(self.weights, PathLike):  # text, so that options are ready for JSON
            object.__setattr__(self, "weights", fspath(self.weights))
        super().__post_init__()

    def for_model(self, model: nn.Module) -> Ccam:
        from tokencomp.trained.cards import check_card, locate
        from tokencomp.trained.ccam_config import read_card

        path = locate(self.weights, model, "ccam", TRAIN)
        card, sizes = read_card(path)
        check_card(card, model, path, TRAIN)
        hidden = card["hidden_size"]
        if (sizes.kv_dim, sizes.out_dim) != (hidden, hidden):
            raise WeightsError(
                f"{path} projects {sizes.kv_dim} to {sizes.out_dim} dimensions, and the model's "
                f"visual tokens have {hidden}. Train weights for this model: {TRAIN}"
            )
        made = Ccam(str(path.absolute()))
        object.__setattr__(made, "_found", made._files())
        place = next(p for p in model.parameters() if p.is_floating_point())
        device = torch.device("cpu") if place.is_meta else place.device  # offloaded: not known yet
        made.projector(device, place.dtype)
        return made

    def projector(self, device: torch.device, dtype: torch.dtype) -> CCAMProjector:
        """The trained module, loaded once per device and dtype."""
        return _load(*self._files(), device, dtype)

    def queries(self) -> int:
        """Tokens per image or video."""
        return _queries(*self._files())

    def _files(self) -> tuple[Path, Stamp]:
        """The weights, and when they and their card were written; once patched they stay."""
        if self._found is not None:
            return self._found
        if self.weights is None:
            raise WeightsError(f"reducer='ccam' needs trained weights. Train them with `{TRAIN}`.")
        path = Path(self.weights).absolute()
        try:
            files = (path, path.with_suffix(".json"))
            return path, tuple(file.stat().st_mtime_ns for file in files)
        except OSError as error:
            raise WeightsError(f"{error}. Train a ccam projector: {TRAIN}") from error

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
        patches = whole_grid(tokens, "ccam")
        x = tokens.features[patches]
        finite_rows(x)
        made = self.projector(x.device, x.dtype)(x[None], tokens.grid[0], tokens.grid[1:])[0]
        wanted = keep - int(tokens.special.sum())
        if wanted != len(made):
            raise SpanError(
                f"{wanted} tokens were asked of a ccam projector that makes {len(made)}."
            )
        step = torch.arange(len(made), device=x.device)
        places = patches[(2 * step + 1) * patches.numel() // (2 * len(made))]
        sizes = torch.full((len(made),), patches.numel() / len(made), device=x.device)
        return rewritten(tokens, places, made, sizes)
