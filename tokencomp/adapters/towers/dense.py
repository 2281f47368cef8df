"""Vision towers that take a batch of square pictures of equal size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.towers.base import Cells, Tower, TowerCall
from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.plan.plan import TowerStage
from tokencomp.tokens.tokens import Grid, Modality


class DenseTower(Tower):
    """Towers of square pictures of equal size; a cell is a square of patches.

    `image` and `video` are the patches of one picture that each token reads, int64 (tokens, m), -1
    for none; a token of a video reads `pooled_frames` frames. The model uses the hidden state (or
    states) `layer` of the tower, counted as in transformers. `restorer`: see `Tower`; None: the
    tower. With `projects_tokens`, the projector gets pooled tokens of a video instead of all
    patches. `keys` gives `Cells.keys` of a call and its modalities; None: all pictures show the
    same place.
    """

    frames_apart = True

    def __init__(
        self,
        module: Any,
        projector: nn.Module,
        image: Tensor,
        video: Tensor | None = None,
        restorer: nn.Module | None = None,
        layer: int | list[int] = -1,
        pooled_frames: int = 1,
        projects_tokens: bool = False,
        keys: Callable[[TowerCall, Tensor], list[tuple[Any, ...]]] | None = None,
    ) -> None:
        blocks = dense_blocks(module)
        self.keys, self.std = keys or (lambda *_: []), usual_std(module.config.model_type)
        self.layer, self.pooled_frames = layer, pooled_frames
        self._projected: Modality | None = None if projects_tokens else "image"
        layers = [layer] if isinstance(layer, int) else layer
        self.indices = [i + len(blocks) + 1 if i < 0 else i for i in layers]
        used, restorers = max(self.indices), [restorer or module]
        ends = blocks[:used], blocks[used:]
        super().__init__(module, *ends, restorers, [projector])
        self.tables: dict[Modality, Tensor]
        self.tables = {"image": image, "video": image if video is None else video}

    def projected(self, modality: Modality) -> int:
        """Rows of one picture or frame that enter the projector."""
        return len(self.tables[self._projected or modality])

    def missing_tokens(self, missing: Tensor, count: int) -> Tensor:
        """Which tokens of a projector's output, bool (pictures, count), read a missing row.

        `missing` is bool (pictures, rows); tokens are one per row, or one per square of patches.
        """
        if missing.shape[1] == count:
            return missing
        table = self.tables["image"].to(missing.device)
        return nn.functional.pad(missing, (0, 1))[:, table].any(-1)  # -1 finds the padding

    def fit(self, stage: TowerStage, family: str) -> TowerStage:
        fitted = super().fit(stage, family)
        if min(self.indices) <= stage.block:
            raise UnsupportedModelError(
                f"{family} also reads hidden state {min(self.indices)} of its vision tower, from "
                f"before block {stage.block}, where all patches are present. Use tower_ratio=0."
            )
        if stage.budget is not None:
            raise UnsupportedModelError(
                f"tower_ratio with a budget: the vision tower of {family} encodes pictures as a "
                "batch of one size, of which each keeps the same number of patches. Use a ratio "
                "instead of the budget, or tower_ratio=0."
            )
        return fitted

    def cells(self, call: TowerCall, stage: TowerStage) -> Cells:
        self._check_call(call)
        table, t = self.tables[call.modality], self.pooled_frames if call.modality == "video" else 1
        pixels, count = self.patches(call.pixels), len(call.pixels)
        per_picture = len(pixels) // max(count, 1)
        side = round(len(table) ** 0.5)
        first = torch.arange(0, count, t, device=pixels.device)[:, None, None, None]
        frame = torch.arange(t, device=pixels.device)[:, None]
        patch = table.to(pixels.device)[:, None]
        members = torch.where(patch < 0, -1, (first + frame) * per_picture + patch).flatten(2)
        parts: list[list[Grid]] = [[(1, side, side)]] * (count // t)
        (keep,) = stage.cells([(1, side, side)])
        rows = 0 if stage.decides else min(per_picture, table.shape[1] * keep)
        keys = [] if call.modalities is None else self.keys(call, call.modalities)
        return Cells(pixels, members.flatten(0, 1), parts, call.modality, count, rows, keys=keys)

    def patches(self, pixels: Tensor) -> Tensor:
        """Pixels (pictures, channels, H, W) → (pictures · patches, channels, 1, height, width)."""
        size = self.module.config.patch_size
        h, w = (size, size) if isinstance(size, int) else size
        cut = pixels[..., : pixels.shape[-2] // h * h, : pixels.shape[-1] // w * w]
        tiles: Tensor = cut.unflatten(-1, (-1, w)).unflatten(-3, (-1, h))
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).unsqueeze(2)

    def _check_call(self, call: TowerCall) -> None:
        """Refuse calls that choose other hidden states than the config."""
        layer = call.arguments.get("vision_feature_layer")
        if layer is not None and layer != self.layer:
            raise OptionError(
                f"vision_feature_layer={layer!r} in a call, but the config has {self.layer!r}, "
                "which the tower stage was set up for. Change the config before patch(), or use "
                "tower_ratio=0."
            )


def usual_std(model_type: str) -> tuple[float, float, float]:
    """See `Tower.std`."""
    if model_type.startswith("clip"):
        return 0.26862954, 0.26130258, 0.27577711
    return (0.229, 0.224, 0.225) if model_type.startswith("internvl") else (0.5, 0.5, 0.5)


def dense_blocks(module: Any) -> list[nn.Module]:
    """Blocks of a tower with an encoder, in order; `UnsupportedModelError` for other structures."""
    encoder = getattr(getattr(module, "vision_model", module), "encoder", None)
    blocks = getattr(encoder, "layers", None) or getattr(encoder, "layer", None)
    if not blocks or not hasattr(module.config, "patch_size"):
        raise UnsupportedModelError(
            f"{type(module).__name__} is no tower of patches with an encoder of blocks, so which "
            "patches a visual token reads is unknown. Use tower_ratio=0."
        )
    return list(blocks)


def squares(side: int, size: int, order: str = "rows", partial: bool = True) -> Tensor:
    """Patches of a grid of side × side that tokens of size × size patches read: (tokens, size²).

    int64, -1 outside of the grid. `order` "rows" has tokens in raster order, "columns" column by
    column. Unless `partial`, squares that the right or bottom edge cuts are no tokens.
    """
    count = -(-side // size) if partial else side // size
    at = torch.arange(count * size)
    inside = at < side
    grid = torch.where(inside[:, None] & inside, at[:, None] * side + at, -1)
    cells = grid.view(count, size, count, size).transpose(1, 2)
    cells = cells.transpose(0, 1) if order == "columns" else cells
    return cells.reshape(count * count, size * size)


def pooled(table: Tensor, size: int) -> Tensor:
    """Patches of tokens that average size × size tokens of `table`, see `squares`."""
    return table[squares(round(len(table) ** 0.5), size, partial=False)].flatten(1)


def bilinear(side: int, out: int) -> Tensor:
    """Patches of side × side that bilinear resampling to out × out reads, int64 (out², 4).

    Patches of weight 0 are included, because 0 · NaN is NaN.
    """
    # As torch.nn.functional.interpolate without align_corners, in float32.
    source = ((torch.arange(out) + 0.5) * (side / out) - 0.5).clamp(min=0)
    low = source.floor().long()
    pair = torch.stack([low, (low + 1).clamp(max=side - 1)], 1)  # (out, 2)
    return (pair[:, None, :, None] * side + pair[None, :, None, :]).reshape(out * out, 4)
