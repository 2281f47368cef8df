"""What one model and one prompt show: times of prefills, and whether two attention backends agree.

Every function returns plain records, which `benchmarks.gpu.prefill` writes down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import tokencomp
from benchmarks.gpu.prompts import TEXT_AFTER, TEXT_BEFORE, Prompt, inputs_of, text_of

MERGED = ", merged"  # of a name: what it does not keep is merged, with weights
REDUCERS = ("uniform", "bipartite", "kcenter", "kcenter" + MERGED, "condiv", "aim")
RATIOS = (0.5, 0.75, 0.9)
# Reducers that compare attention backends: three at entry, one between layers.
COMPARED = ("condiv", "bipartite", "kcenter" + MERGED, "aim")


def method(name: str) -> dict[str, Any]:
    """Options of `patch` for a name."""
    return {"reducer": name.removesuffix(MERGED), "merge": name.endswith(MERGED)}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call: between two CUDA events on a GPU, so that waiting for launches counts."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def run(model: Any, inputs: dict[str, Any]) -> Any:
    """One prefill."""
    with torch.inference_mode():
        return model(**inputs)


def prefills(model: Any, prompt: Prompt, warmup: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One record per reducer and ratio, and one for a patch at ratio 0.

    All variants take their turns in every repeat, so that a change of the clock rate strikes all
    of them. `overhead` is the time of the patched prefill without that of the unpatched model on a
    text as long as the compressed prompt, as a share of the full prefill: what the whole patch
    costs, its launches and host reads included.
    """
    inputs = inputs_of(model, prompt)
    cases = [("ratio 0", 0.0), *((name, ratio) for name in REDUCERS for ratio in RATIOS)]
    columns = inputs["input_ids"].shape[1]
    full: list[float] = []
    patched: dict[Any, list[float]] = {case: [] for case in cases}
    native: dict[int, list[float]] = {}
    stats: dict[Any, Any] = {}
    with tokencomp.patch(model, 0.0) as handle:
        for repeat in range(-warmup, repeats):
            with handle.disabled():
                _note(full, repeat, seconds(lambda: run(model, inputs), model.device))
            for name, ratio in cases:
                handle.set(ratio=ratio, **method(REDUCERS[0] if ratio == 0 else name))
                time_ = seconds(lambda: run(model, inputs), model.device)
                _note(patched[name, ratio], repeat, time_)
                stats[name, ratio] = handle.stats
            for case in cases:
                native.setdefault(_columns_left(columns, prompt, case[1]), [])
            with handle.disabled():
                for length, times in native.items():
                    text = text_of(model, length)
                    _note(times, repeat, seconds(lambda text=text: run(model, text), model.device))
    for case in cases:
        length = _columns_left(columns, prompt, case[1])
        yield _record(case, prompt, full, patched[case], native[length], stats[case])


def _note(times: list[float], repeat: int, value: float) -> None:
    """Keep a time, unless it belongs to the warm-up."""
    if repeat >= 0:
        times.append(value)


def _columns_left(columns: int, prompt: Prompt, ratio: float) -> int:
    """Length of a text that costs as much as the compressed prompt, in columns."""
    visual = prompt.tokens * prompt.media
    return columns - visual + max(1, round(visual * (1 - ratio)))


def _record(
    case: tuple[str, float],
    prompt: Prompt,
    full: list[float],
    patched: list[float],
    native: list[float],
    stats: Any,
) -> dict[str, Any]:
    """Times in seconds, and what follows from their medians."""
    base, own = statistics.median(full), statistics.median(patched)
    reference = base if case[1] == 0 else statistics.median(native)
    limit = stats.flops_before / stats.flops_after if stats else 1.0  # at ratio 0 there are none
    return {
        "reducer": case[0],
        "ratio": case[1],
        "achieved_ratio": round(stats.ratio, 4),
        "visual_tokens": prompt.tokens * prompt.media,
        "text_tokens": TEXT_BEFORE + TEXT_AFTER + prompt.media,
        "seconds_full": full,
        "seconds_patched": patched,
        "seconds_native": native,
        "speedup": round(base / own, 4),
        "flop_limit": round(limit, 4),
        "overhead": round((own - reference) / base, 5),
    }


def flash_available(device: torch.device) -> bool:
    """Whether FlashAttention-2 can run: the package is there, and the device is a GPU."""
    return device.type == "cuda" and find_spec("flash_attn") is not None


def backends(model: Any, prompt: Prompt, other: str) -> Iterator[dict[str, Any]]:
    """Compare SDPA with the backend `other`, patched and unpatched; one record per reducer.

    Half precision rounds differently in the two backends, so the logits of the unpatched model
    differ as well. That difference is the scale on which the patched one is judged. Reducers that
    act at entry must keep the same tokens, because nothing before them depends on the backend.
    """
    inputs, ratio = inputs_of(model, prompt), RATIOS[0]
    answers: dict[str, dict[str, tuple[Tensor, Any]]] = {}
    before = model.config._attn_implementation
    try:
        for backend in ("sdpa", other):
            model.set_attn_implementation(backend)
            answers[backend] = {"unpatched": (run(model, inputs).logits[:, -1].float(), None)}
            for name in COMPARED:
                with tokencomp.patch(model, ratio, **method(name)) as handle:
                    logits = run(model, inputs).logits[:, -1].float()
                    answers[backend][name] = (logits, handle.stats.kept()[-1])
    finally:
        model.set_attn_implementation(before)
    first, second = answers["sdpa"], answers[other]
    scale = float((first["unpatched"][0] - second["unpatched"][0]).abs().max())
    for name in COMPARED:
        (logits, kept), (others, kept_there) = first[name], second[name]
        yield {
            "reducer": name,
            "ratio": ratio,
            "backends": ["sdpa", other],
            "largest_difference": float((logits - others).abs().max()),
            "largest_difference_unpatched": scale,
            "same_next_token": bool((logits.argmax(-1) == others.argmax(-1)).all()),
            "same_tokens_kept": kept == kept_there,
        }
