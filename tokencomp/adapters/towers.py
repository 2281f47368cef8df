"""Vision towers: which patches a visual token reads (its cell), and how the tower lays them out.

Two layouts exist. A *packed* tower takes the patches of all pictures in one row, with bounds of
independent sequences. A *dense* tower takes a batch of pictures of equal size.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tokencomp.errors import OptionError, PlanError, SpanError, UnsupportedModelError
from tokencomp.tokens import Grid

if TYPE_CHECKING:
    from tokencomp.plan import TowerStage

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class EncoderCall:
    """One call of a vision tower, before its first block.

    Attributes
    ----------
    pixels : Tensor
        First argument of the tower: (patches, values) if packed, else (pictures, 3, H, W).
    grids : Tensor of int64, shape (media, 3), or None
        (t, h, w) in patches, for packed towers.
    kind
        What is encoded, as far as the method of the body that called the tower tells.
    arguments
        Arguments of that method by name; empty if nobody noted them.
    """

    pixels: Tensor
    grids: Tensor | None = None
    kind: Kind = "image"
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cells:
    """The cells of one call of a vision tower.

    Attributes
    ----------
    pixels : Tensor, shape (patches, channels, height, width)
        Pixels of every patch, in the order of the tower's input.
    members : Tensor of int64, shape (cells, m)
        Numbers of the patches of every cell; -1: the cell has fewer than m.
    parts
        (t, h, w) in cells of every part that a reducer sees at once, in the order of `members`.
        Parts of one inner list share a budget.
    pictures
        Pictures of a dense tower; 0 if packed.
    rows
        Patches of every picture that stay in a dense tower.
    order : Tensor of int64, shape (cells,), or None
        Which cell stands where inside of a packed tower; None: cells stand in order.
    """

    pixels: Tensor
    members: Tensor
    parts: list[list[Grid]]
    kind: Kind
    pictures: int = 0
    rows: int = 0
    order: Tensor | None = None


class Tower(ABC):
    """How one model lays out its vision tower.

    Attributes
    ----------
    blocks
        The blocks whose output the model uses, in order.
    unused
        Blocks behind them, which need not run.
    restorers
        Modules behind whose output rows stand at their full length again.
    projectors
        Modules that turn patches into tokens, for the count of FLOPs.
    methods
        Methods of `owner` whose arguments say what a call of the tower encodes.
    frames_apart
        See `TowerStage.frames_apart`.
    """

    frames_apart = False

    def __init__(
        self,
        module: Any,
        blocks: list[nn.Module],
        unused: list[nn.Module],
        restorers: list[nn.Module],
        projectors: list[nn.Module],
        owner: Any = None,
        methods: tuple[str, ...] = (),
    ) -> None:
        self.module, self.blocks, self.unused = module, blocks, unused
        self.restorers, self.projectors = restorers, projectors
        self.owner, self.methods = owner, methods

    @abstractmethod
    def cells(self, call: EncoderCall, stage: TowerStage) -> Cells:
        """The cells of a call.

        Raises
        ------
        SpanError
            The call encodes pictures whose cells are not known.
        """

    def check(self, stage: TowerStage, family: str) -> None:
        """Raise `PlanError` if the tower has no block in use with the number of the stage."""
        if stage.block >= len(self.blocks):
            raise PlanError(
                f"tower stage before block {stage.block}, but {family} uses the blocks 0 … "
                f"{len(self.blocks) - 1} of its vision tower. Move the stage."
            )


class PackedTower(Tower):
    """Towers of the Qwen families: a cell is `unit` patches that stand side by side.

    Parameters
    ----------
    window_order
        Computes `Cells.order` from the grids; None: cells stand in order.
    """

    def __init__(self, module: Any, patch_size: int, window_order: Any = None) -> None:
        mergers = [module.merger, *getattr(module, "deepstack_merger_list", [])]
        super().__init__(module, list(module.blocks), [], mergers, mergers)
        self.unit, self.patch_size = module.spatial_merge_size**2, patch_size
        self.window_order = window_order

    def cells(self, call: EncoderCall, stage: TowerStage) -> Cells:
        if call.grids is None:
            raise SpanError(
                f"{type(self.module).__name__} was called without grid_thw, so the patches of its "
                "visual tokens are unknown. Pass the processor's pixels and grids."
            )
        side = round(self.unit**0.5)
        grids = [(t, h // side, w // side) for t, h, w in call.grids.tolist()]
        members = torch.arange(len(call.pixels), device=call.pixels.device).view(-1, self.unit)
        if sum(math.prod(grid) for grid in grids) != len(members):
            raise SpanError(
                f"{len(call.pixels)} patches for grids {call.grids.tolist()}: they do not add up. "
                "Pass the processor's pixels and grids of the same media."
            )
        order = None if self.window_order is None else self.window_order(call.grids)
        order = None if order is None else order.to(members.device)
        pixels = call.pixels.view(len(call.pixels), -1, self.patch_size, self.patch_size)
        return Cells(pixels, members, [[grid] for grid in grids], call.kind, order=order)


class DenseTower(Tower):
    """Towers that take square pictures of equal size; a cell is a square of patches.

    Parameters
    ----------
    image, video
        Patches of one picture that each of its tokens reads: int64 (tokens, m), -1 for none.
    restorer
        The module behind which all rows stand again; None: the tower itself.
    layer
        Which hidden state of the tower the model uses, as transformers counts; a list: several.
    pooled_frames
        Frames of a video that one token reads.
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
        owner: Any = None,
        methods: tuple[str, ...] = ("get_image_features", "get_video_features"),
        pooled_frames: int = 1,
    ) -> None:
        blocks = dense_blocks(module)
        self.layer, self.pooled_frames = layer, pooled_frames
        self.indices = [
            i + len(blocks) + 1 if i < 0 else i
            for i in ([layer] if isinstance(layer, int) else layer)
        ]
        used, restorers = max(self.indices), [restorer or module]
        ends = blocks[:used], blocks[used:]
        super().__init__(module, *ends, restorers, [projector], owner, methods)
        self.tables: dict[Kind, Tensor] = {
            "image": image,
            "video": image if video is None else video,
        }

    def check(self, stage: TowerStage, family: str) -> None:
        super().check(stage, family)
        if min(self.indices) <= stage.block:
            raise UnsupportedModelError(
                f"{family} also reads hidden state {min(self.indices)} of its vision tower, from "
                f"before block {stage.block}, where no patch has left. Use tower_ratio=0."
            )

    def cells(self, call: EncoderCall, stage: TowerStage) -> Cells:
        self._check_call(call)
        table, t = self.tables[call.kind], self.pooled_frames if call.kind == "video" else 1
        pixels, count = self.patches(call.pixels), len(call.pixels)
        per_picture = len(pixels) // max(count, 1)
        if int(table.max()) + 1 > per_picture or count % t:
            raise SpanError(
                f"{count} pictures of {per_picture} patches, where cells of {t} × "
                f"{int(table.max()) + 1} were expected. Pass pixels of the model's own processor."
            )
        side = round(len(table) ** 0.5)
        first = torch.arange(0, count, t, device=pixels.device)[:, None, None, None]
        frame = torch.arange(t, device=pixels.device)[:, None]
        patch = table.to(pixels.device)[:, None]
        members = torch.where(patch < 0, -1, (first + frame) * per_picture + patch).flatten(2)
        parts: list[list[Grid]] = [[(1, side, side)]] * (count // t)
        rows = min(per_picture, table.shape[1] * stage.cells([(1, side, side)])[0])
        return Cells(pixels, members.flatten(0, 1), parts, call.kind, count, rows)

    def patches(self, pixels: Tensor) -> Tensor:
        """Pixels (pictures, channels, H, W) → (pictures · patches, channels, height, width)."""
        size = self.module.config.patch_size
        h, w = (size, size) if isinstance(size, int) else size
        cut = pixels[..., : pixels.shape[-2] // h * h, : pixels.shape[-1] // w * w]
        tiles = cut.unflatten(-1, (-1, w)).unflatten(-3, (-1, h))
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def _check_call(self, call: EncoderCall) -> None:
        """The blocks in use follow from the config, so no call may choose other ones."""
        layer = call.arguments.get("vision_feature_layer")
        if layer is not None and layer != self.layer:
            raise OptionError(
                f"vision_feature_layer={layer!r} in a call, but the config has {self.layer!r}, "
                "which the tower stage was set up for. Change the config before patch(), or use "
                "tower_ratio=0."
            )


class MosaicTower(DenseTower):
    """LLaVA-NeXT and LLaVA-OneVision: an image is a base tile and a mosaic of tiles.

    A mosaic is cut to the shape of its image, so some patches are read by no token. The tiles of a
    mosaic share its budget in proportion to the patches of each that are read.
    """

    def __init__(self, *args: Any, body: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.body = body

    def cells(self, call: EncoderCall, stage: TowerStage) -> Cells:
        if call.kind == "video":
            return super().cells(call, stage)
        self._check_call(call)
        pixels, table = self.patches(call.pixels), self.tables["image"]
        per_picture, side = len(table), round(len(table) ** 0.5)
        members: list[Tensor] = []
        parts: list[list[Grid]] = []
        first = 0
        for size, tiles in self._images(call):
            members.append(torch.arange(first * per_picture, (first + 1) * per_picture))
            parts.append([(1, side, side)])
            if tiles > 1:
                visible = self._mosaic(size, tiles, side)
                members += [(first + 1) * per_picture + part.flatten() for part in visible]
                parts.append([(1, *part.shape) for part in visible])
            first += tiles
        if first != len(call.pixels) or len(pixels) != first * per_picture:
            raise SpanError(
                f"{len(call.pixels)} tiles, but image_sizes say {first}. Pass pixel_values and "
                "image_sizes of one call of the processor."
            )
        # Tiles share budgets, so how many patches one of them keeps depends on the others of its
        # image. The bound is what every tile of the batch gets, whatever stands beside it.
        rows = max(stage.cells([(1, side, side)])[0], stage.most(per_picture))
        numbers = torch.cat(members)[:, None].to(pixels.device)
        return Cells(pixels, numbers, parts, call.kind, first, rows)

    def _images(self, call: EncoderCall) -> list[tuple[list[int], int]]:
        """(height, width) and number of tiles of every image of a call."""
        sizes = call.arguments.get("image_sizes")
        if sizes is None:
            raise SpanError(
                "the vision tower was called outside of get_image_features, so the shapes of the "
                "images are unknown. Pass pixel_values and image_sizes to the model."
            )
        numbers = call.arguments.get("batch_num_images")
        alone = [True] * len(sizes)
        if numbers is not None:  # several images in a sample have one tile each
            alone = [int(n) == 1 for n in numbers for _ in range(int(n))]
        code, config = sys.modules[type(self.body).__module__], self.body.config
        points, image = config.image_grid_pinpoints, config.vision_config.image_size
        listed = [size.tolist() if isinstance(size, Tensor) else list(size) for size in sizes]
        return [
            (size, code.image_size_to_num_patches(size, points, image) if single else 1)
            for size, single in zip(listed, alone, strict=True)
        ]

    def _mosaic(self, size: list[int], tiles: int, side: int) -> list[Tensor]:
        """Patch numbers, from the first tile on, that tokens read: (h, w) for every tile."""
        code, config = sys.modules[type(self.body).__module__], self.body.config
        shape = config.image_grid_pinpoints, config.vision_config.image_size
        down, across = code.get_anyres_image_grid_shape(size, *shape)
        if down * across != tiles - 1:
            raise SpanError(f"image of {size}: {tiles} tiles are no {down}×{across} and a base.")
        raster = torch.arange(down * side * across * side).view(1, down * side, across * side)
        seen = code.unpad_image(raster, size)[0]
        limit = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
        if limit.isdigit() and (seen.numel() / (int(limit) * side**2)) ** 0.5 > 1.1:
            raise SpanError(
                f"image of {size[0]}×{size[1]} pixels: its {tiles - 1} tiles are interpolated to "
                f"{limit}, so its tokens share patches and cannot be dropped one by one in the "
                "vision tower. Use a smaller image, or tower_ratio=0."
            )
        y, x = seen // (across * side), seen % (across * side)
        tile, patch = y // side * across + x // side, y % side * side + x % side
        parts = []
        for number in range(down * across):
            here = tile == number
            h, w = int(here.any(1).sum()), int(here.any(0).sum())
            if h * w:
                parts.append((number * side * side + patch[here]).view(h, w))
        return parts


def dense_blocks(module: Any) -> list[nn.Module]:
    """Blocks of a tower with an encoder, in order.

    Raises
    ------
    UnsupportedModelError
        The tower is built in another way.
    """
    encoder = getattr(getattr(module, "vision_model", module), "encoder", None)
    blocks = getattr(encoder, "layers", None) or getattr(encoder, "layer", None)
    if not blocks or not hasattr(module.config, "patch_size"):
        raise UnsupportedModelError(
            f"{type(module).__name__} is no tower of patches with an encoder of blocks, so which "
            "patches a visual token reads is unknown. Use tower_ratio=0."
        )
    return list(blocks)


def squares(side: int, size: int, order: str = "rows", partial: bool = True) -> Tensor:
    """Patches of a grid of side × side that tokens of size × size patches each read.

    Parameters
    ----------
    order
        "rows": tokens run along rows; "columns": down columns first.
    partial
        Whether squares at the right and at the bottom may be cut off; otherwise they are no tokens.

    Returns
    -------
    Tensor of int64, shape (tokens, size²)
        Patch numbers; -1 for patches outside of the grid.
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

    A patch of weight 0 counts as read, because 0 · NaN is NaN.
    """
    # The same operations in float32 as torch.nn.functional.interpolate without align_corners.
    source = ((torch.arange(out) + 0.5) * (side / out) - 0.5).clamp(min=0)
    low = source.floor().long()
    pair = torch.stack([low, (low + 1).clamp(max=side - 1)], 1)  # (out, 2)
    return (pair[:, None, :, None] * side + pair[None, :, None, :]).reshape(out * out, 4)


def unknown_cells(family: str, reason: str = "") -> UnsupportedModelError:
    """The error for a family whose visual tokens read patches in an unknown way."""
    why = reason or "which patches of its vision tower a visual token reads is not known"
    return UnsupportedModelError(
        f"tower_ratio: {family} has no tower stage, because {why}. Use tower_ratio=0."
    )
