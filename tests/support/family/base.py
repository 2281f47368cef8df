"""The base class of a test family: a tiny random model, and prompts for it."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from support.stamp import Stamp

PAD, EOS, IMAGE, VIDEO, START, END = 0, 2, 150, 151, 152, 153
VOCAB = 200
NO_EOS = 199
# Sizes of most decoders, and ids in the configs of models in the manner of Qwen.
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=EOS,
    pad_token_id=PAD,
)  # fmt: skip
LONG: dict[str, Any] = dict(TEXT, max_position_embeddings=2048)
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO)
ENDS = dict(vision_start_token_id=START, vision_end_token_id=END)
SIGLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
TOWER = dict(
    depth=2, hidden_size=32, out_hidden_size=64, intermediate_size=48, num_heads=2, patch_size=4,
    temporal_patch_size=2, spatial_merge_size=2, in_channels=3,
)  # fmt: skip


@dataclass
class Media:
    """One image or video: its placeholders' ids, and model inputs."""

    ids: list[int]
    inputs: dict[str, Tensor]

    def beside(self, other: Media, shared: int = 0) -> Media:
        """Both, with so many tokens at the end of this and the start of the other left out."""
        inputs = {key: torch.cat([value, other.inputs[key]]) for key, value in self.inputs.items()}
        return Media([*self.ids[: len(self.ids) - shared], *other.ids[shared:]], inputs)


class Family:
    """How to build a model and its media; the rest of the suite is shared."""

    name: ClassVar[str]
    architecture: ClassVar[str]
    mrope: ClassVar[bool] = False
    layers: ClassVar[int] = 4

    def config(self) -> Any:
        raise NotImplementedError

    def build(self, backend: str = "sdpa", seed: int = 0) -> nn.Module:
        """A model of the caller's own: thousands of tests copy one that was built once."""
        stamp, state = self._built(backend, seed)
        torch.set_rng_state(state)  # as building leaves it
        return stamp.copy()

    @functools.cache  # noqa: B019
    def _built(self, backend: str, seed: int) -> tuple[Stamp, Tensor]:
        torch.manual_seed(seed)
        model = self.model_class()(self.config()).eval()
        with torch.no_grad():
            for p in self.decoder(model).parameters():
                if p.ndim == 2:
                    p.mul_(5)  # sharp attention, so that mistakes show
            for name, p in model.named_parameters():
                if "bias" in name or name.endswith("norm.weight"):
                    p.add_(torch.randn_like(p) * 0.02)
                if p.ndim == 2 and not p.any():
                    p.normal_(std=0.3)  # Gemma 3 begins with a projector of zeros
                if name.endswith(("position_embeddings", "position_embedding_table")):
                    p.mul_(0.02)  # else places outweigh pixels, and patches or images look alike
        model.set_attn_implementation(self.attention(backend))
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = NO_EOS
        model.generation_config.do_sample = False
        return Stamp(model), torch.get_rng_state()

    def attention(self, backend: str) -> Any:
        """What `set_attn_implementation` takes for a backend."""
        return backend

    def model_class(self) -> type:
        made: type = getattr(transformers, self.architecture)
        return made

    def config_class(self) -> Any:
        return self.model_class().config_class

    def image(self, size: int = 0) -> Media:
        """An image; `size` 0, 1, 2 are different grids."""
        raise NotImplementedError

    def video(self, frames: int = 4) -> Media:
        """A video, or a picture in place of it."""
        return self.image()

    def batch(self, rows: list[list[Any]]) -> dict[str, Tensor]:
        """Left-padded batch from rows of text ids (lists of ints) and `Media`."""
        ids, parts = [], []
        for row in rows:
            flat: list[int] = []
            for item in row:
                flat += item.ids if isinstance(item, Media) else item
            ids.append(flat)
            parts.append([item.inputs for item in row if isinstance(item, Media)])
        width = max(map(len, ids))
        input_ids = torch.tensor([[PAD] * (width - len(r)) + r for r in ids])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids])
        return self.finish({"input_ids": input_ids, "attention_mask": mask, **self.collect(parts)})

    def collect(self, rows: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """Model inputs of a batch from those of its media, per sample."""
        parts = [p for row in rows for p in row]
        keys = dict.fromkeys(k for p in parts for k in p)
        return {key: torch.cat([p[key] for p in parts if key in p]) for key in keys}

    def finish(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = inspect.signature(self.model_class().forward).parameters
        if self.mrope and "mm_token_type_ids" in parameters:
            ids = inputs["input_ids"]
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return inputs

    def decoder(self, model: nn.Module) -> nn.Module:
        """The text decoder."""
        return model.model.language_model

    def positions(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Positions of the uncompressed prompt, (3, B, L) or (B, L)."""
        mask = inputs["attention_mask"]
        if not self.mrope:
            return (mask.cumsum(-1) - 1).clamp(min=0)
        keys = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        names = inspect.signature(model.model.get_rope_index).parameters
        extra = {k: inputs[k] for k in keys if k in inputs and k in names}
        return model.model.get_rope_index(inputs["input_ids"], attention_mask=mask, **extra)[0]
