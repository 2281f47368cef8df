"""What the Hugging Face path gives for a job of `vllm_driver`, with `tokencomp.patch`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import serving_models as tiny
import torch

import tokencomp


@lru_cache(maxsize=4)
def load(folder: Path) -> tuple[Any, Any]:
    """Model (fp32) and processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model, AutoProcessor.from_pretrained(folder)


def inputs_of(folder: Path, job: dict[str, Any]) -> Any:
    """Processor output for the job."""
    _, processor = load(folder)
    media = tiny.media(job["media"])
    given = {f"{kind}s": items for kind, items in media.items()}
    if "videos" in given:
        given.update(do_sample_frames=False)
        if job.get("metadata"):
            known = [tiny.metadata(len(v)) for v in given["videos"]]
            for values in known:
                values.pop("do_sample_frames")
            given.update(video_metadata=known)
    return processor(text=[job["prompt"]], return_tensors="pt", **given)


@torch.no_grad()
def answer(folder: Path, job: dict[str, Any], positions: str = "original") -> dict[str, Any]:
    """Greedy tokens, their log-probabilities, and the length of the compressed prompt.

    Ratio 0 and no options at all run the unpatched model.
    """
    model, _ = load(folder)
    inputs = inputs_of(folder, job)
    spec = job.get("tokencomp") or {}
    removed, handle, kept = 0, None, None
    if spec.get("ratio", 0) > 0:
        options = spec.get("options", {})
        handle = tokencomp.patch(
            model, spec["ratio"], reducer=spec.get("reducer", "divprune"), positions=positions,
            **options,
        )  # fmt: skip
    try:
        out = model.generate(
            **inputs, max_new_tokens=job.get("tokens", 8), do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        if handle is not None:
            stats = handle.stats
            removed = stats.tokens_before[0] - stats.tokens_after[0][-1]
            kept = columns(stats)
    finally:
        if handle is not None:
            handle.remove()
    n = inputs["input_ids"].shape[1]
    tokens = out.sequences[0, n:].tolist()
    logprobs = [
        float(torch.log_softmax(step[0].float(), -1)[token])
        for step, token in zip(out.logits, tokens, strict=True)
    ]
    return {"tokens": tokens, "logprobs": logprobs, "prompt": n - removed, "full": n, "kept": kept}


def columns(stats: Any) -> list[int]:
    """Columns of the uncompressed prompt that are left."""
    left = set(range(stats.lengths[0]))
    for span, kept in zip(stats.spans[0], stats.kept(0)[-1], strict=True):
        left -= set(range(span.start, span.stop))
        left |= {span.start + k for k in kept}
    return sorted(left)


def grid_positions(
    ids: list[int], grids: list[tuple[int, int, int]], pads: tuple[int, ...], t_factor: float
) -> torch.Tensor:
    """M-RoPE positions (3, n) in the plainest loops: what follows media starts at their max + 1.

    Recent transformers instead start it at base + max(h, w), which for long videos lies inside
    the video; engines and the models' training use the maximum.
    """
    out: list[tuple[int, int, int]] = []
    waiting, i, following = list(grids), 0, 0
    while i < len(ids):
        if ids[i] not in pads:
            out.append((following, following, following))
            following, i = following + 1, i + 1
            continue
        t, h, w = waiting.pop(0)
        base = following
        for a in range(t):
            for b in range(h):
                for c in range(w):
                    out.append((base + int(a * t_factor), base + b, base + c))
                    i += 1
        following = max(max(p) for p in out) + 1
    return torch.tensor(out).T


def true_positions(folder: Path, job: dict[str, Any]) -> torch.Tensor:
    """`grid_positions` of a job's uncompressed prompt; of Qwen3-VL, a frame is a grid."""
    model, _ = load(folder)
    inputs, config = inputs_of(folder, job), model.config
    frames = config.model_type.startswith("qwen3")
    ids = inputs["input_ids"][0].tolist()
    videos = inputs.get("video_grid_thw", torch.empty(0, 3)).tolist()
    if frames:
        videos = [[1, h, w] for t, h, w in videos for _ in range(int(t))]
    queues = {
        config.image_token_id: iter(inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()),
        config.video_token_id: iter(videos),
    }
    grids, previous = [], None
    for token in ids:
        if token in queues and token != previous:
            t, h, w = next(queues[token])
            grids.append((int(t), int(h) // 2, int(w) // 2))
        previous = token
    seconds = inputs.get("second_per_grid_ts")
    factor = 1.0
    if seconds is not None:
        factor = float(seconds[0]) * config.vision_config.tokens_per_second
    return grid_positions(ids, grids, tuple(queues), factor)


@contextlib.contextmanager
def with_true_positions(folder: Path, job: dict[str, Any]) -> Iterator[None]:
    """Let the model use `true_positions`, whatever its transformers release computes."""
    model, _ = load(folder)
    positions = true_positions(folder, job)
    delta = positions.max() + 1 - positions.shape[1]
    own = model.model.get_rope_index

    @functools.wraps(own)
    def get_rope_index(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] != positions.shape[1]:  # a probe, not the prompt
            return own(input_ids, *args, **kwargs)
        return positions[:, None], delta[None, None]

    model.model.get_rope_index = get_rope_index
    try:
        yield
    finally:
        del model.model.get_rope_index


def end_tokens(folder: Path) -> Any:
    """The end tokens that the folder's own generation config names."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder).eos_token_id
