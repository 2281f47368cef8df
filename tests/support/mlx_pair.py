"""One embedded model twice: in transformers and in mlx-vlm, with a prompt for both.

Import this module before mlx_vlm, which replaces the processors of transformers: those that are
loaded here are the original ones.
"""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tokencomp import zoo
from tokencomp.inputs.media import load_media

NAMES = ("tiny-qwen2-vl", "tiny-qwen3-vl", "tiny-qwen3-5", "tiny-llava-onevision")
REFERENCES = {name: zoo.load(name) for name in NAMES}
IMAGE, VIDEO = "test-attribute-00001.jpg", "test-direction-00002.mp4"


@functools.cache
def pair(name: str) -> SimpleNamespace:
    """Both models in float32, and the processor of transformers."""
    import mlx.core as mx
    from mlx_vlm.utils import load

    reference, processor = REFERENCES[name]
    model, _ = load(str(zoo.model_path(name)))
    model.set_dtype(mx.float32)
    return SimpleNamespace(reference=reference.float(), processor=processor, model=model)


def prompt(both: SimpleNamespace, media: str, frames: int = 4) -> SimpleNamespace:
    """A question about a sample: inputs of transformers, and ids, pixels and the rest in MLX."""
    import mlx.core as mx

    rows = json.loads((zoo.SAMPLES / "questions.json").read_text())
    row = next(r for r in rows if r["media"] == media)
    content = [{"type": row["kind"]}, {"type": "text", "text": row["question"]}]
    text = both.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    pixels = {row["kind"] + "s": [load_media(zoo.SAMPLES / media, frames=frames)]}
    inputs = both.processor(text=[text], **pixels, return_tensors="pt")
    arrays = {
        key: mx.array(value.numpy().astype(np.int32 if value.dtype == torch.int64 else np.float32))
        for key, value in inputs.items()
        if key not in ("attention_mask", "mm_token_type_ids")
    }
    return SimpleNamespace(
        inputs=inputs,
        ids=arrays.pop("input_ids"),
        pixels=arrays.pop("pixel_values", None),
        rest=arrays,
    )


def answered(both: SimpleNamespace, inputs: Any, tokens: int) -> list[int]:
    """Greedy tokens of transformers, at least one and up to the end of the answer."""
    out = both.reference.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids
