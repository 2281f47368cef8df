"""One tiny model twice: in transformers and in mlx-vlm, with a prompt for both.

Import this module before mlx_vlm, which replaces the processors of transformers: those that are
loaded here are the original ones. Types without an embedded model have random weights.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from support.serving.models import BUILDERS
from tokencomp import zoo
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.media import load_media
from tokencomp.storage import write_json

TRAINED = ("tiny-qwen2-vl", "tiny-qwen3-vl", "tiny-qwen3-5", "tiny-llava-onevision")
RANDOM = ("qwen2_5_vl", "qwen3_vl_moe", "qwen3_5_moe", "llava")
NAMES = (*TRAINED, *RANDOM)
_root = tempfile.TemporaryDirectory()


def _folder(name: str) -> Path:
    """The folder of a model, with a config in the words of published checkpoints."""
    if name in TRAINED:
        return zoo.model_path(name)
    folder = Path(_root.name) / name
    if not folder.exists():
        folder.mkdir()
        BUILDERS[name](folder)
    if name == "qwen3_vl_moe":
        config = json.loads((folder / "config.json").read_text())
        text = config["text_config"]
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        text |= {"num_experts": text.pop("num_local_experts"), "tie_word_embeddings": False}
        config["vision_config"]["model_type"] = name
        write_json(folder / "config.json", config)
    return folder


FOLDERS = {name: _folder(name) for name in NAMES}
REFERENCES = {name: load_model(str(FOLDERS[name]), device="cpu", dtype="float32") for name in NAMES}
IMAGE, VIDEO = "test-attribute-00001.jpg", "test-direction-00002.mp4"
CASES = [(name, media) for name in NAMES for media in (IMAGE, VIDEO)]
CASES.remove(("llava", VIDEO))  # which takes images alone


@functools.cache
def pair(name: str) -> SimpleNamespace:
    """Both models in float32, and the processor of transformers."""
    import mlx.core as mx
    from mlx_vlm.utils import load

    reference, processor = REFERENCES[name]
    model, _ = load(str(FOLDERS[name]))
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
    if "second_per_grid_ts" in inputs:  # mlx-vlm reads no times: frames follow at distance 1
        speed = both.reference.config.vision_config.tokens_per_second
        inputs["second_per_grid_ts"] = torch.tensor([1 / speed])
    arrays = {
        key: mx.array(value.numpy().astype(np.int32 if value.dtype == torch.int64 else np.float32))
        for key, value in inputs.items()
        if key not in ("attention_mask", "mm_token_type_ids", "second_per_grid_ts")
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
