"""Regions of a screenshot to look at closer, and the way back to pixels of the screenshot."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from tokencomp.errors import OptionError


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture, in pixels of that picture.

        screenshot 1920 × 1080          what the model gets          click (x, y) there
        ┌──────────────────────┐   cut   ┌───────────┐  processor   ┌─────────────┐
        │   (left, top)┌─────┐ │ ──────→ │           │ ───────────→ │  ·          │ seen_width ×
        │              └─────┘ │         └───────────┘   resizes    └─────────────┘ seen_height
        └──────────────────────┘         width × height                   │
                    ↑                        locate(x, y, seen)           │
                    └─────────────────────────────────────────────────────┘

    Attributes
    ----------
    left, top
        The first pixel.
    width, height
        In pixels.
    """

    left: int
    top: int
    width: int
    height: int

    @classmethod
    def around(cls, x: int, y: int, size: tuple[int, int], within: tuple[int, int]) -> Region:
        """The region of a size with pixel (x, y) in its middle, moved inside the picture.

        Parameters
        ----------
        x, y
            A pixel of the picture, for example what `locate` returned.
        size
            Width and height of the region; at most those of the picture are taken.
        within
            Width and height of the picture: `image.size`.

        Raises
        ------
        OptionError
            The pixel is outside the picture, or a size is not positive.
        """
        if not (0 <= x < within[0] and 0 <= y < within[1]):
            raise OptionError(
                f"pixel ({x}, {y}) is outside a picture of {within[0]} × {within[1]} px; x is in "
                f"0..{within[0] - 1}, y in 0..{within[1] - 1}."
            )
        if min(size) < 1:
            raise OptionError(f"a region of {size[0]} × {size[1]} px: both must be at least 1.")
        width, height = min(size[0], within[0]), min(size[1], within[1])
        left = min(max(x - width // 2, 0), within[0] - width)
        top = min(max(y - height // 2, 0), within[1] - height)
        return cls(left, top, width, height)

    def cut(self, image: Image.Image) -> Image.Image:
        """The pixels of the region, unscaled.

        Raises
        ------
        OptionError
            The picture is smaller than the region's place: another one than the screenshot.
        """
        right, bottom = self.left + self.width, self.top + self.height
        if right > image.width or bottom > image.height:
            raise OptionError(
                f"a region up to pixel ({right}, {bottom}) of a picture of {image.width} × "
                f"{image.height} px: cut it out of the picture whose size `within` named."
            )
        return image.crop((self.left, self.top, right, bottom))

    def locate(self, x: float, y: float, seen: tuple[int, int]) -> tuple[int, int]:
        """The pixel of the picture at pixel (x, y) of the region as a model saw it.

        Parameters
        ----------
        x, y
            What the model answered: from 0 to `seen`, which counts as the last pixel.
        seen
            Width and height in the unit of the answer: of the resized region where a model answers
            in its pixels (Qwen2.5-VL; for Qwen families `image_grid_thw` times the patch size), or
            (1000, 1000) where it answers in thousandths (Qwen3-VL).

        Raises
        ------
        OptionError
            The place is outside of what the model saw.
        """
        if not (0 <= x <= seen[0] and 0 <= y <= seen[1]):
            raise OptionError(
                f"place ({x:g}, {y:g}) in a region seen as {seen[0]} × {seen[1]}: x must be in "
                f"0..{seen[0]}, y in 0..{seen[1]}. Give `seen` in the unit of the answer."
            )
        # Pixel x covers [x, x + 1): its middle decides.
        column = min(int((x + 0.5) * self.width / seen[0]), self.width - 1)
        row = min(int((y + 0.5) * self.height / seen[1]), self.height - 1)
        return self.left + column, self.top + row
