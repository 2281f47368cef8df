"""The vision tower of LLaVA-NeXT and LLaVA-OneVision, whose images are mosaics of tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.towers.base import Cells, TowerCall
from tokencomp.adapters.towers.dense import DenseTower
from tokencomp.errors import SpanError
from tokencomp.plan.plan import TowerStage
from tokencomp.tokens.tokens import Grid
from tokencomp.torchlib.compat import file_with


class MosaicTower(DenseTower):
    """An image is a base tile and a mosaic of tiles.

    Mosaics are cropped to the shape of the image, so some patches are read by no token. The tiles
    of a mosaic share its budget in proportion to their patches that are read. `ends`: line breaks
    after a video.
    """

    def __init__(self, *args: Any, body: Any, ends: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.body, self.ends = body, ends

    def cells(self, call: TowerCall, stage: TowerStage) -> Cells:
        if call.modality == "video":
            return self._with_ends(super().cells(call, stage), call)
        self._check_call(call)
        pixels, table = self.patches(call.pixels), self.tables["image"]
        per_picture, side = len(table), round(len(table) ** 0.5)
        members: list[Tensor] = []
        parts: list[list[Grid]] = []
        keys: list[tuple[int, ...]] = []
        tokens: list[int] = []
        patches: list[Tensor] = []
        first = 0
        for size, tiles in self._images(call):
            members.append(torch.arange(first * per_picture, (first + 1) * per_picture))
            parts.append([(1, side, side)])
            tokens.append(per_picture)
            patches.append(sum(map(len, patches)) + torch.arange(per_picture))
            if tiles > 1:
                visible, raster, breaks = self._mosaic(size, tiles, side)
                members += [(first + 1) * per_picture + part.flatten() for part in visible]
                parts.append([(1, *part.shape) for part in visible])
                tokens[-1] += breaks
                tokens += [part.numel() for part in visible]
                patches.append(sum(map(len, patches)) + raster)
            keys += [(*size, number) for number in range(len(tokens) - len(keys))]
            first += tiles
        if first != len(call.pixels) or len(pixels) != first * per_picture:
            raise SpanError(
                f"{len(call.pixels)} tiles, but image_sizes say {first}. Pass pixel_values and "
                "image_sizes of one call of the processor."
            )
        # How many patches a tile keeps depends on the other tiles of its image. All tiles of the
        # batch get this upper bound of rows, independent of other images.
        rows = max(stage.cells([(1, side, side)])[0], stage.most(per_picture))
        rows = 0 if stage.decides else rows
        numbers = torch.cat(members)[:, None].to(pixels.device)
        return Cells(
            pixels, numbers, parts, call.modality, first, rows, keys=keys, tokens=tokens,
            patches=torch.cat(patches),
        )  # fmt: skip

    def _with_ends(self, cells: Cells, call: TowerCall) -> Cells:
        """Count the line breaks after videos among the tokens of their last frames."""
        if call.modalities is None:
            return cells
        frames = next(x for x in call.arguments.values() if isinstance(x, Tensor)).shape[1]
        tokens = [h * w for ((_, h, w),) in cells.parts]
        tokens[frames - 1 :: frames] = [n + self.ends for n in tokens[frames - 1 :: frames]]
        return replace(cells, tokens=tokens)

    def _images(self, call: TowerCall) -> list[tuple[list[int], int]]:
        """(height, width) and number of tiles of every image of a call."""
        sizes = call.arguments["image_sizes"]
        numbers = call.arguments.get("batch_num_images")
        alone = [True] * len(sizes)
        if numbers is not None:  # several images in a sample have one tile each
            alone = [int(n) == 1 for n in numbers for _ in range(int(n))]
        code, config = file_with(type(self.body), "unpad_image"), self.body.config
        points, image = config.image_grid_pinpoints, config.vision_config.image_size
        listed = [size.tolist() if isinstance(size, Tensor) else list(size) for size in sizes]
        return [
            (size, code.image_size_to_num_patches(size, points, image) if single else 1)
            for size, single in zip(listed, alone, strict=True)
        ]

    def _mosaic(self, size: list[int], tiles: int, side: int) -> tuple[list[Tensor], Tensor, int]:
        """Patches that tokens read, counted from the first tile on: (h, w) for every tile.

        And the numbers of their tokens in the raster of the mosaic, (patches,), and of line breaks.
        """
        code, config = file_with(type(self.body), "unpad_image"), self.body.config
        shape = config.image_grid_pinpoints, config.vision_config.image_size
        down, across = code.get_anyres_image_grid_shape(size, *shape)
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
        parts, numbers = [], []
        for number in range(down * across):
            inside = tile == number
            h, w = int(inside.any(1).sum()), int(inside.any(0).sum())
            if h * w:
                parts.append((number * side * side + patch[inside]).view(h, w))
                numbers.append(inside.flatten().nonzero()[:, 0])
        return parts, torch.cat(numbers), len(seen)
