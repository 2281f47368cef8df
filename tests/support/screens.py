"""Pictures of one size that follow each other, of which it is known which cells changed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_STD, OPENAI_CLIP_STD

from support.families import Family, Media

THRESHOLD = 8
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
CLIP = ("qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "llava_next_video")
ONE_SIZE = ("llava", "smolvlm", "idefics3", "vila")  # of all whole pictures


@dataclass
class Shown(Media):
    """A picture or video.

    Attributes
    ----------
    kept
        Cells that stay of it, in the order of its tokens.
    cells
        Number of all its cells.
    read
        Which patches the cells that stay read, bool (pictures, patches); of dense towers.
    """

    kept: list[int] = field(default_factory=list)
    cells: int = 0
    read: Tensor | None = None


def deviations(family: Family) -> Tensor:
    """By what the processor of a family divides pixels of 0 … 1."""
    if family.name == "internvl":
        return torch.tensor(IMAGENET_DEFAULT_STD)
    return torch.tensor(OPENAI_CLIP_STD if family.name in CLIP else [0.5, 0.5, 0.5])


class Screen:
    """One screen after the other, of towers that take the patches of all media as one sequence.

    A cell that did not change differs from the last kept one by up to `noise` levels; one that
    changed differs by more than `THRESHOLD` in a single value. Of a picture in which nothing
    changed, the first cell stays, and is then the last kept one.
    """

    def __init__(self, family: Family, first: Media, noise: int = THRESHOLD) -> None:
        self.noise = noise
        (self.name,) = (key for key in first.inputs if key.startswith("pixel_values"))
        # Frames and patch size.
        self.levels = (1 / (255 * deviations(family))).repeat_interleave(2 * 4 * 4)
        (grid,) = next(v for k, v in first.inputs.items() if k.endswith("grid_thw")).tolist()
        self.last = first.inputs[self.name].view(grid[0], -1, 4, 96)[0].clone()
        self.cells, self.frames = len(self.last), grid[0]
        number = self.cells * self.frames
        self.first = Shown(first.ids, first.inputs, list(range(number)), number)

    def show(self, *changed: set[int]) -> Shown:
        """The next picture, or a video of so many steps."""
        steps = []
        for cells in changed:
            noise = torch.randint(-self.noise, self.noise + 1, self.last.shape)
            new = self.last + noise * self.levels
            for cell in cells:
                new[cell] = self.last[cell]
                new[cell, 1, 40] += (THRESHOLD + 1) * self.levels[40]
                self.last[cell] = new[cell]
            steps.append(new)
        if not any(changed):
            self.last[0] = steps[0][0]
        kept = [i * self.cells + cell for i, cells in enumerate(changed) for cell in sorted(cells)]
        return self._shown(torch.cat(steps), kept or [0], self.cells * len(changed))

    def plain(self) -> Shown:
        """A picture of one colour but for cell 5 of 4 × 4, and what neighbours do not predict.

        Cell 5, the one to its right, and the one below it, which an edge predicts.
        """
        pixels = 0.001 * torch.randn_like(self.last)  # rows are told apart by their values
        pixels[5] += 0.5
        return self._shown(pixels, [0, 5, 6, 9], self.cells)

    def _shown(self, pixels: Tensor, kept: list[int], cells: int) -> Shown:
        inputs = {**self.first.inputs, self.name: pixels.flatten(0, 1)}
        return Shown(self.first.ids, inputs, kept, cells)


class TiledScreen:
    """As `Screen`, of towers that take a batch of tiles, or frames, of one size.

    Cells are squares of pixels, of every tile in raster order (VILA: column by column), or in the
    raster of a mosaic of tiles that follows the first tile (LLaVA-NeXT, LLaVA-OneVision). A tile
    in which nothing changed keeps its first cell.
    """

    def __init__(
        self, family: Family, first: Media, frames: int = 1, noise: int = THRESHOLD
    ) -> None:
        self.noise = noise
        (self.name,) = (key for key in first.inputs if key.startswith("pixel_values"))
        self.media, self.frames = first, frames
        self.levels = 1 / (255 * deviations(family))
        tiles = first.inputs[self.name].flatten(0, -4)
        size, sizes = tiles.shape[-1], first.inputs.get("image_sizes")
        self.side = 4 if sizes is not None or family.name == "llava" else 8
        if sizes is not None:
            height, width = (n // 4 for n in sizes[0].tolist())
            mosaic = itertools.product(range(height), range(width))
            tiles = tiles[: 1 + height * width // 16]
        across = -(-size // self.side)
        raster = list(itertools.product(range(across), range(across)))
        if family.name == "vila":
            raster = [(row, column) for column, row in raster]
        count = 1 if frames > 1 or sizes is not None else len(tiles)
        self.places = [(tile, y, x) for tile in range(count) for y, x in raster]
        if sizes is not None:
            self.places += [(1 + y // 4 * (width // 4) + x // 4, y % 4, x % 4) for y, x in mosaic]
        self.cells = len(self.places)
        self.last = tiles[:1].clone() if frames > 1 else tiles.clone()
        everything = set(range(self.cells))
        self.first = self._shown([*tiles.split(len(self.last))], [everything] * frames)
        self.last = tiles[-len(self.last) :].clone()

    def show(self, *changed: set[int]) -> Shown:
        """The next picture, or a video of so many steps."""
        steps, levels = [], self.levels[:, None, None]
        for cells in changed:
            noise = torch.randint(-self.noise, self.noise + 1, self.last.shape)
            new = self.last + noise * levels
            for cell in cells:
                at = self._square(cell)
                new[at] = self.last[at]
                new[at][1, 2, 3] += (THRESHOLD + 1) * self.levels[1]
            for at in map(self._square, cells | self._firsts(cells)):
                self.last[at] = new[at]
            steps.append(new)
        return self._shown(steps, list(changed))

    def plain(self) -> Shown:
        """As `Screen.plain`; cell 5 is in the first tile."""
        pixels = 0.001 * torch.randn_like(self.last)
        pixels[self._square(5)] += 0.5
        return self._shown([pixels], [{0, 5, 6, 9}])

    def _square(self, cell: int) -> tuple[int, slice, slice, slice]:
        """Tile, channels, and pixels of a cell."""
        tile, y, x = self.places[cell]
        n = self.side
        return tile, slice(None), slice(y * n, y * n + n), slice(x * n, x * n + n)

    def _firsts(self, cells: set[int]) -> set[int]:
        """The first cells of the tiles in which none of these is."""
        firsts: dict[int, int] = {}
        for cell, (tile, *_) in enumerate(self.places):
            firsts.setdefault(tile, cell)
        return set(firsts.values()) - {firsts[self.places[cell][0]] for cell in cells}

    def _shown(self, steps: list[Tensor], kept: list[set[int]]) -> Shown:
        cells, read = [], []
        for i, chosen in enumerate(kept):
            chosen = chosen | self._firsts(chosen)
            cells += [i * self.cells + cell for cell in sorted(chosen)]
            mask = torch.zeros(self.last[:, 0].shape, dtype=torch.bool)
            for cell in chosen:
                tile, _, *at = self._square(cell)
                mask[(tile, *at)] = True
            read.append(mask[:, ::4, ::4].flatten(1))  # patches of 4 × 4 pixels
        pixels, shape = torch.cat(steps), self.media.inputs[self.name].shape
        padding = pixels.new_zeros(shape[-4] - len(pixels), *shape[-3:])  # of short mosaics
        inputs = {**self.media.inputs, self.name: torch.cat([pixels, padding]).view(shape)}
        return Shown(self.media.ids, inputs, cells, self.cells * len(kept), torch.cat(read))


def of_family(family: Family) -> tuple[Any, Any, Any]:
    """A screen, another of another size (or the same, in families of one size), and a video.

    Of two steps; LLaVA-NeXT has none, and shows pictures.
    """
    if family.name in PACKED:
        media = family.image(0), family.image(1), family.video(4)
        a, b, v = (Screen(family, m) for m in media)
        return a, b, v
    a = TiledScreen(family, family.image(0))
    b = a if family.name in ONE_SIZE else TiledScreen(family, family.image(1))
    if family.name == "llava_next":
        return a, b, TiledScreen(family, family.image(0))
    return a, b, TiledScreen(family, family.video(2), frames=2)
