"""VILA and NVILA in tokencomp's class of that model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tokencomp.adapters.base import Adapter, MediaCall, block_means, runs_of
from tokencomp.adapters.registry import register_adapter
from tokencomp.adapters.structure import Parts
from tokencomp.adapters.towers.base import TowerCall, unknown_cells
from tokencomp.adapters.towers.dense import DenseTower, pooled, squares
from tokencomp.errors import SpanError
from tokencomp.tokens.tokens import Modality, VisualSpan


@register_adapter
class VilaAdapter(Adapter):
    r"""Images and frames are squares, each followed by the special separator "\n".

    A video is one span of all its frames and separators. The model is also its body: its forward
    inserts the features and calls the language model.
    """

    family = "VILA"
    model_types = ("llava_llama", "vila")
    signals = (*Adapter.signals, "tower")
    encoders: ClassVar[dict[str, Modality]] = {"encode_videos": "video"}

    def find_parts(self, model: Any) -> Parts:
        return Parts(model, model, model.llm.model)

    def tower_tokens(self, values: Tensor, modality: str, call: TowerCall) -> Tensor:
        projector, side = self.model.mm_projector, round(values.shape[1] ** 0.5)
        grid = block_means(values.unflatten(1, (side, side)), projector.factor)
        if projector.order == "columns":
            grid = grid.transpose(1, 2)
        t, h, w = self._pool if modality == "video" else (1, 1, 1)
        pooled: Tensor = grid.unflatten(2, (-1, w)).unflatten(1, (-1, h)).unflatten(0, (-1, t))
        return pooled.mean(dim=(1, 3, 5)).flatten(0, 2)

    @property
    def feature_layer(self) -> int | list[int]:
        layer: int = self.model.config.select_layer
        return layer

    def tower_layout(self) -> DenseTower:
        projector, config = self.model.mm_projector, self.model.config
        (t, h, w), order = self._pool, projector.order
        if h != w:
            raise unknown_cells(self.family, f"its videos are averaged over {h}×{w} tokens")
        image = squares(config.patches_per_side, projector.factor, order)
        video = pooled(image, h)
        return DenseTower(
            self.model.vision_tower, projector, image, video, layer=self.feature_layer,
            pooled_frames=t, keys=self._keys,
        )  # fmt: skip

    def _keys(self, call: TowerCall, modalities: Tensor) -> list[tuple[Any, ...]]:
        """Number of tiles of the only image of a prompt, and number of the tile, if it is cut."""
        if call.modality == "video" or self.model.config.image_aspect_ratio != "dynamic":
            return []
        rows = [[run for run in runs if run[2] == "image"] for runs in runs_of(modalities)]
        return [(len(runs), number) for runs in rows for number in range(len(runs))]

    def spans(self, call: MediaCall) -> list[list[VisualSpan]]:
        frames = call.inputs.get("video_frames")
        lengths = iter([] if frames is None else [n // self._pool[0] for n in frames.tolist()])
        rows = []
        for row, runs in enumerate(runs_of(call.modalities)):
            spans = []
            while runs:
                n = 1 if runs[0][2] == "image" else next(lengths, len(runs))
                spans.append(self._span(runs[:n], call, row, n))
                runs = runs[n:]
            rows.append(spans)
        return rows

    @property
    def _pool(self) -> tuple[int, int, int]:
        t, h, w = self.model.config.video_pool
        return t, h, w

    def _span(self, runs: list[Any], call: MediaCall, row: int, n: int) -> VisualSpan:
        """One image, or the frames of one video, with their separators."""
        config, side = self.model.config, self.model.config.side
        modality = runs[0][2]
        _, h, w = self._pool if modality == "video" else (1, 1, 1)
        grid = (n, side // h, side // w)
        squares = len(runs) == n and all(b - a == grid[1] * grid[2] for a, b, _ in runs)
        before, after = config.video_ends if modality == "video" else config.image_ends
        start, stop = runs[0][0] - len(before), runs[-1][1] + len(after)
        special: list[int] = []
        cursor = start
        for a, b, _ in runs:
            special += range(cursor - start, a - start)
            cursor = b
        special += range(cursor - start, stop - start)
        separators = len(special) == n * (len(before) + len(after))
        if not (squares and separators and stop <= call.modalities.shape[1]):
            raise SpanError(
                f"sample {row}: {modality} tokens from {runs[0][0]} on are not {n} squares of "
                f"{grid[1]}×{grid[2]} tokens, each with its separators. Make input_ids and pixels "
                "with VilaProcessor."
            )
        return VisualSpan(start, stop - start, grid, modality, special=tuple(special))
