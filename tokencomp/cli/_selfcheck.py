"""Self-check: a patched call sees fewer tokens and equals the masked run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.conformance.oracle import columns_left, hidden
from tokencomp.evaluation.profiler import counted_rows
from tokencomp.inputs.prompts import build_inputs, to_model
from tokencomp.pages.html import compact
from tokencomp.training.capture import eager_attention

QUESTION = "What color is the circle?"
RATIO = 0.5
REDUCERS = ("uniform", "prune")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Finding:
    """`ok` is None for findings that are neither right nor wrong."""

    name: str
    ok: bool | None
    detail: str


def self_check(model: Any, processor: Any) -> list[Finding]:
    """Compress a real prompt and compare with counted rows and the masked full-length run.

    One reducer acts at entry and one between layers; finally `unpatch` restores outputs.
    """
    inputs = to_model(build_inputs(processor, [[_picture()]], [QUESTION]), model)
    with counted_rows(model) as full_rows:
        plain = _logits(model, inputs)
    checks, adapter = [], adapter_for(model)
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    for reducer in REDUCERS:
        with tokencomp.patch(model, RATIO, reducer=reducer) as handle, counted_rows(model) as rows:
            compressed = _logits(model, inputs)
            stats = handle.stats
        if not stats:
            checks.append(Finding(reducer, False, "the prompt ran uncompressed"))
            continue
        text = stats.lengths[0] - stats.tokens_before[0]
        expected = [text + n for n in stats.tokens_after[0]]
        fewer = rows == expected and sum(rows) < sum(full_rows)
        detail = f"rows per layer {compact(full_rows)} → {compact(rows)}, ratio {stats.ratio:.3f}"
        checks.append(Finding(f"{reducer}: layers see fewer tokens", fewer, detail))
        left = columns_left(stats, handle.plan, real, len(adapter.layers))
        with eager_attention(adapter), hidden(adapter.layers, left):  # dropped columns are masked
            masked = _logits(model, inputs)
        off = float((compressed - masked).abs().max())
        equal = off <= TOLERANCE[model.dtype] * max(1.0, float(masked.abs().max()))
        detail = f"largest difference of logits {off:.1e}"
        checks.append(Finding(f"{reducer}: equals the masked run", equal, detail))
    after = _logits(model, inputs)
    same = torch.equal(after, plain)
    checks.append(Finding("unpatch restores the model", same, "identical logits" if same else "no"))
    return checks


def _picture() -> Any:
    """A red disc on a gradient: every patch differs."""
    from PIL import Image, ImageDraw

    image = Image.radial_gradient("L").resize((224, 224)).convert("RGB")
    ImageDraw.Draw(image).ellipse((30, 50, 110, 130), fill=(200, 30, 30))
    return image


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, use_cache=False, logits_to_keep=1).logits.float()
