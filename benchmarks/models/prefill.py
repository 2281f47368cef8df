"""LLM prefill with and without compression, real decoder shapes, random weights.

    python benchmarks/models/prefill.py                     # all cases → prefill.jsonl, prefill.md
    python benchmarks/models/prefill.py --models llava-onevision-0.5b --tokens 2048

Patched and unpatched runs alternate in one process; the medians of their times are compared. The
vision tower does not run: visual features are given (random), so these are LLM-only numbers. The
limit is arithmetic: FLOPs without / with compression.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tokencomp
from tokencomp.evaluation.environment import environment

HERE = Path(__file__).parent
TEXT_BEFORE, TEXT_AFTER = 16, 48
REDUCERS = {
    "uniform": {},
    "merge": {},
    "aim": {},
    "prune": {},
}
OVERHEAD_LIMIT = {"uniform": 0.02, "merge": 0.02, "aim": 0.05, "prune": 0.05}


def llava_onevision() -> tuple[nn.Module, Any]:
    """Decoder of LLaVA-OneVision-0.5B (Qwen2-0.5B), one-layer vision tower."""
    text = transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=152000, max_position_embeddings=32768,
        rope_theta=1e6, tie_word_embeddings=True,
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=1152, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16,
            image_size=384, patch_size=14,
        ),
        image_token_id=151646, video_token_id=151647, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config), config


def qwen2_vl() -> tuple[nn.Module, Any]:
    """Decoder of Qwen2-VL-2B, one-layer vision tower."""
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768,
            rope_parameters={**rope, "rope_theta": 1e6}, tie_word_embeddings=True,
        ),
        vision_config=dict(depth=1, embed_dim=64, hidden_size=1536, num_heads=2),
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config), config


MODELS = {"llava-onevision-0.5b": llava_onevision, "qwen2-vl-2b": qwen2_vl}


def setup(name: str, tokens: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Model and the inputs of one prompt with a video of about `tokens` visual tokens."""
    torch.manual_seed(0)
    model, config = MODELS[name]()
    model = model.to(dtype).eval()
    hidden = config.text_config.hidden_size
    if name.startswith("llava"):
        frames = round(tokens / 196)
        features = torch.randn(1, frames * 196 + 1, hidden)
        grid = {}
    else:
        features = (torch.randn(round(tokens / 256) * 256, hidden),)
        grid = {"video_grid_thw": torch.tensor([[round(tokens / 256), 32, 32]])}
    base = smooth(torch.as_tensor(features if isinstance(features, Tensor) else features[0]))
    n = base.shape[-2]
    video = config.video_token_id
    ids = torch.tensor([[9] * TEXT_BEFORE + [video] * n + [11] * TEXT_AFTER])
    output = type("Output", (dict,), {"__getattr__": dict.get})
    pooled = base.to(dtype) if name.startswith("llava") else (base.to(dtype),)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"video": output(pooler_output=pooled)},
        **grid,
    }
    if grid:
        inputs["mm_token_type_ids"] = 2 * (ids == video).int()
    return model, inputs


def smooth(x: Tensor) -> Tensor:
    """Neighbouring tokens of real images are alike; scale as embeddings are."""
    return (0.02 * (x + x.roll(1, -2) + x.roll(2, -2))).contiguous()


def prefill(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Seconds of one prefill."""
    start = time.perf_counter()
    with torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def peak_of(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes allocated at the peak of one prefill above what was there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        prefill(model, inputs)
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def reduce_seconds(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Time spent in the reducer and in its scores during one patched prefill."""
    from tokencomp import run as module

    total = 0.0
    names = [("Run", "_reduce"), ("Run", "score")]
    originals = [getattr(getattr(module, owner), name) for owner, name in names]
    entry = module.entry_scores

    def timed(function):
        def call(*args, **kwargs):
            nonlocal total
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                total += time.perf_counter() - start

        return call

    for (owner, name), original in zip(names, originals, strict=True):
        setattr(getattr(module, owner), name, timed(original))
    module.entry_scores = timed(entry)
    try:
        prefill(model, inputs)
    finally:
        for (owner, name), original in zip(names, originals, strict=True):
            setattr(getattr(module, owner), name, original)
        module.entry_scores = entry
    return total


def measure(name: str, tokens: int, dtype: torch.dtype, ratios: list[float], repeats: int):
    """One record per reducer and ratio."""
    model, inputs = setup(name, tokens, dtype)
    prefill(model, inputs)
    peak_full = peak_of(model, inputs)
    for reducer in REDUCERS:
        for ratio in ratios:
            with tokencomp.patch(model, ratio, reducer=reducer, **REDUCERS[reducer]) as handle:
                prefill(model, inputs)
                peak = peak_of(model, inputs)
                full, short, overhead = [], [], []
                for _ in range(repeats):
                    with handle.disabled():
                        full.append(prefill(model, inputs))
                    short.append(prefill(model, inputs))
                    overhead.append(reduce_seconds(model, inputs))
                stats = handle.stats
            limit = stats.flops_before / stats.flops_after
            speedup = statistics.median(full) / statistics.median(short)
            yield {
                "model": name,
                "dtype": str(dtype).removeprefix("torch."),
                "visual_tokens": stats.tokens_before[0],
                "text_tokens": TEXT_BEFORE + TEXT_AFTER,
                "reducer": reducer,
                "ratio": ratio,
                "achieved_ratio": round(stats.ratio, 4),
                "seconds_full": full,
                "seconds_compressed": short,
                "speedup": round(speedup, 3),
                "flop_limit": round(limit, 3),
                "fraction_of_limit": round(speedup / limit, 3),
                "reduce_overhead": round(
                    statistics.median(overhead) / statistics.median(full), 4
                ),
                "peak_bytes_full": peak_full,
                "peak_bytes_compressed": peak,
                "kv_bytes_full": stats.kv_bytes_before,
                "kv_bytes_compressed": stats.kv_bytes_after,
            }


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = [
        "| model | visual tokens | reducer | ratio | prefill speed-up | FLOP limit | of limit | "
        "reduce / full prefill | peak memory | KV cache |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        peak = r["peak_bytes_compressed"] / r["peak_bytes_full"]
        kv = r["kv_bytes_compressed"] / r["kv_bytes_full"]
        lines.append(
            f"| {r['model']} | {r['visual_tokens']} | {r['reducer']} | {r['ratio']} | "
            f"{r['speedup']:.2f}× | {r['flop_limit']:.2f}× | {100 * r['fraction_of_limit']:.0f} % | "
            f"{100 * r['reduce_overhead']:.1f} % | {100 * peak:.0f} % | {100 * kv:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "prefill.jsonl")
    args = parser.parse_args()
    records = []
    with args.out.open("w") as file:
        for name in args.models:
            for tokens in args.tokens:
                dtype = getattr(torch, args.dtype)
                for record in measure(name, tokens, dtype, args.ratios, args.repeats):
                    record["environment"] = environment()
                    records.append(record)
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    print(table([record]).splitlines()[-1], flush=True)
    args.out.with_suffix(".md").write_text(table(records))
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory of this process: {usage / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
