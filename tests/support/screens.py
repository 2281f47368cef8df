"""Pictures of one size that follow each other, of which it is known which cells changed."""

from __future__ import annotations

import torch
from transformers.image_utils import OPENAI_CLIP_STD

from support.families import Family, Media

THRESHOLD = 8


class Screen:
    """One screen after the other.

    A cell that did not change differs from the last kept one by up to `noise` levels; one that
    changed differs by more than `THRESHOLD` in a single value.
    """

    def __init__(self, family: Family, first: Media, noise: int = THRESHOLD) -> None:
        self.first, self.noise = first, noise
        (self.name,) = (key for key in first.inputs if key.startswith("pixel_values"))
        clip = family.name in ("qwen2_vl", "qwen2_5_vl")
        std = torch.tensor(OPENAI_CLIP_STD if clip else [0.5, 0.5, 0.5])  # of their processors
        self.levels = (1 / (255 * std)).repeat_interleave(2 * 4 * 4)  # frames and patch size
        (grid,) = next(v for k, v in first.inputs.items() if k.endswith("grid_thw")).tolist()
        self.last = first.inputs[self.name].view(grid[0], -1, 4, 96)[0].clone()

    def show(self, *changed: set[int]) -> Media:
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
        return Media(
            self.first.ids, {**self.first.inputs, self.name: torch.cat(steps).flatten(0, 1)}
        )
