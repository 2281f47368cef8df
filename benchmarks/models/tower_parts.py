"""What the benchmark of the first token measures: models of real shapes, prompts, their parts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.benchmark import timer

from benchmarks.models import shapes
from benchmarks.models.shapes import SHAPES
from tokencomp.adapters.registry import adapter_for
from tokencomp.plan.options import Traits
from tokencomp.reducers.kcenter import KCenter
from tokencomp.tokens.tokens import Kept, Tokens
from tokencomp.torchlib.hooks import Hooked

TEXT = 48
UNIT = 28  # pixels of a side that become one visual token in Qwen2-VL
VISION = {"qwen2_vl": 32, "llava_onevision": 26}
"""Blocks of the vision towers."""
STEPS = 5  # timed single-token steps after a prefill


@dataclass(frozen=True, eq=False)
class Timed(KCenter):
    """k-center that adds up what choosing costs."""

    clock: Any = None
    spent: Any = None

    traits = Traits(batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        start = self.clock()
        kept = super().reduce(tokens)
        self.spent.append(self.clock() - start)
        return kept


def clock_of(device: str, threads: int = 1) -> Callable[[], float]:
    """Processor time of this process on one CPU thread; elapsed time on several, and on a GPU."""
    return time.process_time if device == "cpu" and threads == 1 else timer


def build(name: str, args: argparse.Namespace, layers: int | None = None) -> Any:
    """A model of that shape; `layers` of its decoder, None for all that there are."""
    shape = SHAPES[name]
    model, _ = shapes.build(
        name,
        tokens=1,
        layers=layers or shape.layers // args.part,
        vision_layers=VISION[shape.family] // args.part,
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )
    model.set_attn_implementation(args.attention)
    return model


def qwen_inputs(model: Any, frames: int, side: int, args: argparse.Namespace) -> dict[str, Any]:
    """The processor's output for a picture (frames = 0) or video of noise, and its seconds."""
    from transformers import Qwen2VLImageProcessor

    clock, generator = clock_of("cpu", args.threads), torch.Generator().manual_seed(0)
    pictures = [
        Image.fromarray(torch.randint(256, (side, side, 3), generator=generator).byte().numpy())
        for _ in range(max(frames, 1))
    ]
    processor = Qwen2VLImageProcessor(min_pixels=UNIT**2, max_pixels=side**2)
    start, kind = clock(), "video" if frames else "image"
    # A video is read as pairs of frames: every patch holds two of them. The image processor repeats
    # a single picture instead, so a video's pixels are put together from its frames in pairs.
    parts = [processor(images=[p], return_tensors="pt")["pixel_values"] for p in pictures]
    seconds = clock() - start
    if frames:
        halves = [part.unflatten(1, (3, 2, -1)) for part in parts]
        pairs = zip(halves[::2], halves[1::2], strict=True)
        parts = [torch.stack([a[:, :, 0], b[:, :, 1]], 2).flatten(1) for a, b in pairs]
    t, h = len(parts), side // 14
    token = getattr(model.config, f"{kind}_token_id")
    count = t * (side // UNIT) ** 2
    before, after = [5] * 16 + [model.config.vision_start_token_id], [7] * (TEXT - 16)
    ids = torch.tensor([[*before, *[token] * count, model.config.vision_end_token_id, *after]])
    suffix = "_videos" if frames else ""
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token).int() * (2 if frames else 1),
        f"pixel_values{suffix}": torch.cat(parts).to(getattr(torch, args.dtype)),
        f"{kind}_grid_thw": torch.tensor([[t, h, h]]),
    }
    moved = {name: value.to(args.device) for name, value in inputs.items()}
    return {"inputs": moved, "preprocess": seconds, "tokens": count}


class Marks(Hooked):
    """When the tower, the projector and the decoder of a model begin and end."""

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self.clock, self.at = clock, {}
        adapter = adapter_for(model)
        parts = {"tower": adapter.tower, "decoder": adapter.decoder}
        for name, module in parts.items():
            self._handles += [
                module.register_forward_pre_hook(self._mark(f"{name} begins"), prepend=True),
                module.register_forward_hook(self._mark(f"{name} ends")),
            ]

    def _mark(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.at[name] = self.clock()

        return hook

    def seconds(self, part: str) -> float:
        return self.at[f"{part} ends"] - self.at[f"{part} begins"]


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind the keys and values of all layers."""
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values))
    return sum(t.untyped_storage().nbytes() for t in tensors)


def later_token(model: Any, output: Any, clock: Callable[[], float]) -> float:
    """Median seconds of a greedy single-token step after a prefill; a warm-up step comes first."""
    seconds = []
    for _ in range(1 + STEPS):
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        start = clock()
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])
