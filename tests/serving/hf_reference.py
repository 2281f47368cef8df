"""What the Hugging Face path gives for a job of `vllm_driver`, with `tokencomp.patch`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
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
    return processor(text=[job["prompt"]], return_tensors="pt", **given)


@torch.no_grad()
def answer(folder: Path, job: dict[str, Any], positions: str = "original") -> dict[str, Any]:
    """Greedy tokens, their log-probabilities, and the length of the compressed prompt.

    Ratio 0 and no options at all run the unpatched model.
    """
    model, _ = load(folder)
    inputs = inputs_of(folder, job)
    spec = job.get("tokencomp") or {}
    removed, handle = 0, None
    if spec.get("ratio", 0) > 0:
        options = spec.get("options", {})
        handle = tokencomp.patch(
            model, spec["ratio"], reducer=spec.get("reducer", "merge"), positions=positions,
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
    finally:
        if handle is not None:
            handle.remove()
    n = inputs["input_ids"].shape[1]
    tokens = out.sequences[0, n:].tolist()
    logprobs = [
        float(torch.log_softmax(step[0].float(), -1)[token])
        for step, token in zip(out.logits, tokens, strict=True)
    ]
    return {"tokens": tokens, "logprobs": logprobs, "prompt": n - removed, "full": n}
