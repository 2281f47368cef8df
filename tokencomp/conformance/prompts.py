"""A small ragged batch of prompts with images, whose features replace the vision tower.

Models without images get clips of sound in their place. `get_image_features` of the model returns
random features instead of calling the tower. Everything behind it (the scatter into placeholders,
positions, masks, `generate`) is the model's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokencomp.conformance.build import BuildError, TinyModel
from tokencomp.conformance.configs import (
    AUDIO_PLACEHOLDERS,
    FIRST_SPECIAL,
    PLACEHOLDERS,
    spatial_merge,
)
from tokencomp.conformance.shrink import VOCABULARY

GRID = (1, 3, 4)
LAYOUTS = ("list", "stacked", "flat")
# What stands around an image in the prompts of the families that look for it.
MARKERS = (
    ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
    ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
)


@dataclass
class VisionOutput(BaseModelOutputWithPooling):
    """What image encoders return, with the fields that some families add."""

    deepstack_features: Any = None
    visual_indicator_features: Any = None
    vision_outputs: Any = None
    router_logits: Any = None


class Prompts:
    """Two prompts with different numbers of words and images, as inputs of one tiny model.

    Parameters
    ----------
    tiny
        The model. Its `get_image_features` is replaced for good.

    Raises
    ------
    BuildError
        The model takes no features in any of the known layouts.
    """

    def __init__(self, tiny: TinyModel, seed: int = 3) -> None:
        self.tiny, self.model = tiny, tiny.model
        self.image_id, self.medium = placeholder(tiny)
        self._method = f"get_{self.medium}_features"
        self._layout, self._width = LAYOUTS[0], tiny.text_config.hidden_size
        self._features: list[Tensor] = []
        self._replaced = [m for m in self._owners() if self._method in dir(m)]
        if not self._replaced:
            raise BuildError(f"{type(self.model).__name__} has no {self._method}")
        self._names = set(inspect.signature(type(self.model).forward).parameters)
        for module in self._replaced:
            self._replace(module)
        self._find_layout(seed)

    # -- features ---------------------------------------------------------------------------------

    def _owners(self) -> list[nn.Module]:
        """The modules whose `get_image_features` (or `get_audio_features`) may be called."""
        modules = [self.model, getattr(self.model, "base_model", None)]
        modules += [getattr(self.model, "model", None)]
        return list(dict.fromkeys(m for m in modules if isinstance(m, nn.Module)))

    def _replace(self, module: Any) -> None:
        """Let a module of the tiny model return features, by a subclass of its class.

        A method of the instance would count as another compression method's change.
        """
        own = type(module)

        @functools.wraps(getattr(own, self._method))
        def features(module: Any, *args: Any, **kwargs: Any) -> Any:
            return self._output()

        names = {self._method: features, "__module__": own.__module__}
        module.__class__ = type(own.__name__, (own,), names)

    def _output(self) -> VisionOutput:
        images = [f[:, : self._width] for f in self._features]
        hidden = self.tiny.text_config.hidden_size
        deep = [f[:, :hidden] * 0.3 for f in self._features]
        layers = getattr(self.tiny.config, "deepstack_layer_map", None)
        return VisionOutput(
            last_hidden_state=torch.stack(images),
            pooler_output=self._arranged(images),
            deepstack_features=[(layer, deep) for _, layer in layers] if layers else [deep, deep],
            visual_indicator_features=torch.ones(8, hidden),
        )

    def _arranged(self, images: list[Tensor]) -> Any:
        if self._layout == "list":
            return images
        return torch.stack(images) if self._layout == "stacked" else torch.cat(images)

    def _find_layout(self, seed: int) -> None:
        """Take the first length, width and layout of features that the model accepts."""
        errors = []
        counts = self.tiny.variant.image_tokens
        for count, width, layout in itertools.product(counts, self._widths(), LAYOUTS):
            generator = torch.Generator().manual_seed(seed)
            self.rows = [self._row(words, count, generator) for words in ((4, 3, 5), (2, 4))]
            self._layout, self._width = layout, width
            try:
                self.forward(self.inputs())
                return
            except Exception as error:
                errors.append(f"{count} × {width} {layout}: {type(error).__name__}: {error}"[:300])
        raise BuildError("no layout of features fits: " + " | ".join(errors))

    def _widths(self) -> list[int]:
        """The decoder's width, and that of the input of a projector that is a part of the body."""
        widths = [self.tiny.text_config.hidden_size]
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and "projector" in name:
                widths.append(module.in_features)
                break
        return widths

    # -- inputs -----------------------------------------------------------------------------------

    def _row(
        self, words: tuple[int, ...], per_image: int, generator: torch.Generator
    ) -> tuple[list[int], Tensor]:
        """Token ids and features of a prompt with an image between each two runs of words."""
        ids: list[int] = []
        before, after = (self._marker(names) for names in MARKERS)
        for i, n in enumerate(words):
            if i:
                ids += [*before, *[self.image_id] * per_image, *after]
            ids += torch.randint(120, 480, (n,), generator=generator).tolist()
        count = len(words) - 1
        features = torch.randn(count, per_image, max(self._widths()), generator=generator)
        for offset in self.tiny.variant.newlines:
            newline = self.model.model.image_newline.detach()
            features[:, offset, : len(newline)] = newline
        return ids, features

    def _marker(self, names: tuple[str, ...]) -> list[int]:
        known = self.tiny.specials
        return next(([known[n]] for n in names if n in known and known[n] != self.image_id), [])

    def inputs(self, rows: list[int] | None = None, new: Tensor | None = None) -> dict[str, Any]:
        """Left-padded inputs of some rows, as a processor would give them.

        Parameters
        ----------
        rows
            Numbers of the rows; None: all.
        new : Tensor of int64, shape (B, T)
            Further words behind every prompt.
        """
        chosen = [self.rows[i] for i in (range(len(self.rows)) if rows is None else rows)]
        ids = [r[0] + ([] if new is None else new[i].tolist()) for i, r in enumerate(chosen)]
        width = max(map(len, ids))
        table = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        self._features = [image for _, images in chosen for image in images]
        return {"input_ids": table, "attention_mask": mask, **self._media(table, mask)}

    def _media(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """The arguments that come with images."""
        images = len(self._features)
        if self.medium == "audio":
            sound = torch.zeros(images, 8, 16)
            names = ("input_features", "input_values", "input_features_mask")
            return {name: sound for name in names if name in self._names}
        values: dict[str, Any] = {"pixel_values": torch.zeros(images, 3, 8, 8)}
        if "high_res_pixel_values" in self._names:
            values["high_res_pixel_values"] = values["pixel_values"]
        kinds = (ids == self.image_id).long()
        if "mm_token_type_ids" in self._names:
            values["mm_token_type_ids"] = kinds
        if "token_type_ids" in self._names:
            values["token_type_ids"] = self._token_types(ids, mask)
        if "moe_mm_token_type_ids" in self._names:
            values["moe_mm_token_type_ids"] = kinds
        if "image_grid_thw" in self._names:
            merge = spatial_merge(self.tiny.config)
            grid = (GRID[0], GRID[1] * merge, GRID[2] * merge)
            values["image_grid_thw"] = torch.tensor([grid] * images)
        return values

    def _token_types(self, ids: Tensor, mask: Tensor) -> Tensor:
        """1 at images; PaliGemma has 0 at the prefix: the image and a part of the words."""
        kinds = (ids == self.image_id).long()
        if "paligemma" not in self.tiny.config.model_type:
            return kinds
        behind = (kinds.flip(-1).cumsum(-1).flip(-1) == 0).long().cumsum(-1) > 2
        return (behind & mask.bool()).long()

    def image_columns(self) -> Tensor:
        """Where visual tokens stand, bool (B, L)."""
        result: Tensor = self.inputs()["input_ids"] == self.image_id
        return result

    # -- calls ------------------------------------------------------------------------------------

    @property
    def own_positions(self) -> bool:
        """Whether the model itself computes positions for a padded batch with images."""
        return any(hasattr(m, "get_rope_index") for m in self.model.modules())

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """One forward call, with the positions that `generate` would give."""
        if not self.own_positions:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            inputs = {**inputs, "position_ids": positions}
        return self.model(**inputs, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
        """Greedy words (B, T), and logits (B, T, V) of the prompt's last token and all but one.

        Placeholders and markers are suppressed, which `Janus.generate` respects in the settings
        but not as a logits processor.
        """
        with _plain_settings(self.model):
            out = self.model.generate(
                **inputs,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                suppress_tokens=[0, *range(FIRST_SPECIAL, VOCABULARY)],
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences[:, -steps:], torch.stack(list(out.logits), 1)


@contextlib.contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Keep the generation settings of the default config out of a call."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = before


def placeholder(tiny: TinyModel) -> tuple[int, str]:
    """The token id that features replace, and their medium: images, else sound.

    Raises
    ------
    BuildError
        The config names none.
    """
    for medium, names in (("image", PLACEHOLDERS), ("audio", AUDIO_PLACEHOLDERS)):
        for source in (tiny.specials.get, lambda name: getattr(tiny.config, name, None)):
            value = next((v for v in map(source, names) if isinstance(v, int)), None)
            if value is not None:
                return value, medium
    codes = getattr(tiny.config, "vocabulary_map", None) or {}
    if "<image>" in codes:
        return int(codes["<image>"]), "image"
    raise BuildError(f"the config of {type(tiny.model).__name__} names no placeholder")
