"""A small ragged batch of prompts with images, whose features replace the vision tower.

Models without images get sound clips. Features are random, see `tokencomp.conformance.features`;
the scatter into placeholders, positions, masks and `generate` are those of the model.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.structure import IDS
from tokencomp.conformance.build import BuildError, TinyModel
from tokencomp.conformance.configs import FIRST_SPECIAL, spatial_merge
from tokencomp.conformance.features import Encoder, layouts
from tokencomp.conformance.shrink import VOCABULARY
from tokencomp.torchlib.compat import CACHE_NAMES

GRID = (1, 3, 4)
# Arguments that take pixels, by family.
PIXELS = ("pixel_values", "high_res_pixel_values", "pixel_values_images", "image_patches")
Row = tuple[list[int], Tensor]
"""A prompt: its token ids, and the features (media, tokens, d) of its images or clips."""
TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
"""Arguments with the kind of every token."""
# Tokens around an image, for families that need them in the prompt.
MARKERS = (
    ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
    ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
)


class Prompts:
    """Two prompts with different numbers of words and images, as inputs of one tiny model.

    Its tower is replaced, see `Encoder`. A model that takes no known layout of features raises
    `BuildError`.
    """

    def __init__(self, tiny: TinyModel) -> None:
        from transformers import GenerationConfig

        self.tiny, self.model = tiny, tiny.model
        self.image_id, self.medium = placeholder(tiny)
        self.encoder = Encoder(tiny, self.medium)
        # Without the settings of the default config.
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        # Whether it computes positions for a padded batch with images itself.
        self._own_positions = any(hasattr(m, "get_rope_index") for m in self.model.modules())
        self._names = set(inspect.signature(type(self.model).forward).parameters)
        self.cache_name = next((n for n in CACHE_NAMES if n in self._names), CACHE_NAMES[1])
        self._find_layout()

    def _find_layout(self) -> None:
        """Take the first length, width and layout of features that the model accepts."""
        errors, encoder = [], self.encoder
        counts = self.tiny.variant.image_tokens
        for count, width, layout in itertools.product(counts, encoder.widths(), layouts()):
            generator, self._count = torch.Generator().manual_seed(3), count
            self.rows = [self._row(words, generator) for words in ((4, 3, 5), (2, 4))]
            encoder.layout, encoder.width = layout, width
            try:
                self.forward(self.inputs())
                break
            except Exception as error:
                errors.append(f"{count} × {width} {layout}: {type(error).__name__}: {error}"[:300])
        else:
            self._check_words()
            raise BuildError("no layout of features fits: " + " | ".join(errors))
        if not encoder.calls:
            name = type(self.model).__name__
            raise BuildError(f"forward of {name} in this release never encodes the media of a call")

    def _check_words(self) -> None:
        """Raise `BuildError` if the model fails without media and compression."""
        words = self.inputs()
        try:
            self.forward({name: words[name] for name in ("input_ids", "attention_mask")})
        except Exception as error:
            raise BuildError(
                f"{type(self.model).__name__} of this transformers release fails by itself, on a "
                f"prompt of words: {type(error).__name__}: {error}"
            ) from error

    def row(self, words: tuple[int, ...], seed: int) -> Row:
        """A random prompt with an image between each two runs of so many words."""
        return self._row(words, torch.Generator().manual_seed(seed))

    def _row(self, words: tuple[int, ...], generator: torch.Generator) -> Row:
        ids: list[int] = []
        before, after = (self._marker(names) for names in MARKERS)
        for i, n in enumerate(words):
            if i:
                ids += [*before, *[self.image_id] * self._count, *after]
            ids += torch.randint(120, 480, (n,), generator=generator).tolist()
        count = len(words) - 1
        features = torch.randn(count, self._count, max(self.encoder.widths()), generator=generator)
        for offset in self.tiny.variant.newlines:
            newline = self.model.model.image_newline.detach()
            features[:, offset, : len(newline)] = newline
        return ids, features

    def _marker(self, names: tuple[str, ...]) -> list[int]:
        known = self.tiny.specials
        return next(([known[n]] for n in names if n in known and known[n] != self.image_id), [])

    def inputs(self, rows: list[int] | None = None, new: Tensor | None = None) -> dict[str, Any]:
        """Left-padded inputs of some rows (None: all), as from a processor.

        `new` (B, T) are further words after every prompt.
        """
        chosen = [self.rows[i] for i in (range(len(self.rows)) if rows is None else rows)]
        if new is not None:
            chosen = [(ids + new[i].tolist(), media) for i, (ids, media) in enumerate(chosen)]
        return self.arguments(chosen)

    def arguments(self, rows: list[Row], seen: list[Row] | None = None) -> dict[str, Any]:
        """Left-padded inputs of any rows; the media of the rows `seen`, their beginnings, are left
        out.
        """
        width = self.width(rows)
        table = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in rows])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
        before = [0] * len(rows) if seen is None else [len(media) for _, media in seen]
        new = [media[n:] for (_, media), n in zip(rows, before, strict=True)]
        self.encoder.images = [one for media in new for one in media]
        return {"input_ids": table, "attention_mask": mask, **self._media(table, mask)}

    def turn(
        self, rows: list[Row], seen: list[Row] | None = None, start: int = 0
    ) -> dict[str, Any]:
        """`arguments` of a forward call from column `start` on, with the positions of all."""
        positions = self._positions(self.arguments(rows))
        inputs = self.arguments(rows, seen) | {"position_ids": positions}
        for name in ("input_ids", "position_ids", *TYPES):
            if name in inputs:
                inputs[name] = inputs[name][..., start:]
        return inputs

    def _positions(self, inputs: dict[str, Any]) -> Tensor:
        """What the decoder gets as positions in a call without a cache, (..., B, L)."""
        found: list[Any] = []

        def read(decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
            found.append(kwargs.get("position_ids"))

        # Before the hooks of a patch, which would give those of the rows alone.
        hook = self.tiny.decoder.register_forward_pre_hook(read, prepend=True, with_kwargs=True)
        try:
            self.forward(inputs, use_cache=False)
        finally:
            hook.remove()
        return found[0] if found[0] is not None else _counted(inputs)

    @staticmethod
    def width(rows: list[Row]) -> int:
        """Columns of a batch of rows."""
        return max(len(ids) for ids, _ in rows)

    def _media(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Arguments for images, or for sound clips."""
        images = len(self.encoder.images)
        if self.medium == "audio":
            if not images:
                return {}
            sounds = [name for name in ("input_features", "input_values") if name in self._names]
            values: dict[str, Any] = {name: torch.zeros(images, 8, 16) for name in sounds}
            if "input_features_mask" in self._names:
                real = torch.ones(images, self.encoder.images[0].shape[0], dtype=torch.bool)
                values["input_features_mask"] = real
            return values
        kinds = (ids == self.image_id).long()
        types = {
            "mm_token_type_ids": kinds,
            "token_type_ids": self._token_types(ids, mask),
            "moe_mm_token_type_ids": kinds,
        }
        types = {name: value for name, value in types.items() if name in self._names}
        if not images:
            return types
        # Families that name the sizes of images in patches pack the patches of all in one row.
        shape = (1 if "target_sizes" in self._names else images, 3, 8, 8)
        names = [name for name in PIXELS if name in self._names] or PIXELS[:1]
        merge = spatial_merge(self.tiny.config)
        known = {
            # The question, which the tower reads as well.
            "qformer_input_ids": torch.zeros(images, 4, dtype=torch.long),
            "image_grid_thw": torch.tensor([(GRID[0], GRID[1] * merge, GRID[2] * merge)] * images),
        }
        taken = {name: value for name, value in known.items() if name in self._names}
        return {**{name: torch.zeros(shape) for name in names}, **types, **taken}

    def _token_types(self, ids: Tensor, mask: Tensor) -> Tensor:
        """1 at images; PaliGemma has 0 at the prefix: the image and a part of the words."""
        kinds = (ids == self.image_id).long()
        if "paligemma" not in self.tiny.config.model_type:
            return kinds
        behind = (kinds.flip(-1).cumsum(-1).flip(-1) == 0).long().cumsum(-1) > 2
        return (behind & mask.bool()).long()

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """One forward call, with the positions of `generate`."""
        if not self._own_positions:
            inputs = {"position_ids": _counted(inputs), **inputs}
        return self.model(**inputs, **kwargs)

    def generate(self, inputs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
        """Greedy words (B, T), and logits (B, T, V) of the prompt's last token and all but one."""
        out = self.answer(inputs, steps)
        return out.sequences[:, -steps:], torch.stack(list(out.logits), 1)

    @torch.no_grad()
    def answer(self, inputs: dict[str, Any], steps: int, **options: Any) -> Any:
        """The output of `generate` for exactly so many words, with logits.

        Placeholders and markers are suppressed, which `Janus.generate` respects in the settings
        but not as a logits processor.
        """
        return self.model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            suppress_tokens=[0, *range(FIRST_SPECIAL, VOCABULARY)],
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


def _counted(inputs: dict[str, Any]) -> Tensor:
    """Positions (B, L) that count the columns without padding."""
    counted: Tensor = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return counted


def placeholder(tiny: TinyModel) -> tuple[int, str]:
    """The token id that features replace, and its modality: images, else sound."""
    for medium in ("image", "audio"):
        for source in (tiny.specials.get, lambda name: getattr(tiny.config, name, None)):
            value = next((v for v in map(source, IDS[medium]) if isinstance(v, int)), None)
            if value is not None:
                return value, medium
    codes = getattr(tiny.config, "vocabulary_map", None) or {}
    if "<image>" in codes:
        return int(codes["<image>"]), "image"
    raise BuildError(f"the config of {type(tiny.model).__name__} names no placeholder")
