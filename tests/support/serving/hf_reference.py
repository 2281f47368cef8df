"""Reference results of `vllm_driver`'s jobs from Hugging Face models with `tokencomp.patch`."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tokencomp
from support.serving import media as tiny
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.video import Video
from tokencomp.serving.limits import Limits
from tokencomp.serving.media import load_image
from tokencomp.serving.video import load_video

DECIDING = ("delta", "pixelprune")  # at ratio 0 too


@lru_cache(maxsize=4)
def load(folder: Path) -> tuple[Any, Any]:
    """Load model (fp32) and processor; generation does not stop at an end token."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model, AutoProcessor.from_pretrained(folder)


def inputs_of(folder: Path, job: dict[str, Any]) -> Any:
    """Return the processor's output for a job."""
    _, processor = load(folder)
    media = tiny.media(job["media"])
    arguments = {f"{kind}s": items for kind, items in media.items()}
    if "videos" in arguments:
        arguments.update(do_sample_frames=False)
        if job.get("metadata"):
            video_metadata = [tiny.metadata(len(v)) for v in arguments["videos"]]
            for values in video_metadata:
                values.pop("do_sample_frames")
            arguments.update(video_metadata=video_metadata)
    return processor(text=[job["prompt"]], return_tensors="pt", **arguments)


@torch.no_grad()
def answer(folder: Path, job: dict[str, Any], positions: str = "original") -> dict[str, Any]:
    """Return greedy tokens, their log-probabilities, and lengths of the prompt.

    A job with ratio 0 or without options runs the unpatched model. "prompt" is the length of the
    compressed prompt, "full" that of the uncompressed one, and "kept" lists the kept columns.
    """
    model, _ = load(folder)
    inputs = inputs_of(folder, job)
    spec = job.get("tokencomp") or {}
    removed, handle, kept = 0, None, None
    ratio = spec.get("ratio", 0)
    largest = max(ratio.values()) if isinstance(ratio, dict) else ratio
    if largest > 0 or "budget" in spec or spec.get("reducer") in DECIDING:
        tower = {name: spec[name] for name in ("tower_ratio", "tower_reducer") if name in spec}
        handle = tokencomp.patch(
            model, spec.get("ratio"), budget=spec.get("budget"),
            reducer=spec.get("reducer", "kcenter"), positions=positions,
            merge=spec.get("merge", False), **tower,
            **spec.get("options", {}),
        )  # fmt: skip
    try:
        out = model.generate(
            **inputs, max_new_tokens=job.get("tokens", 8), do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        if handle is not None:
            stats = handle.stats
            kept = columns(stats)
            removed = stats.lengths[0] - len(kept)
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


def _clip(url: str) -> Video:
    frames, sampling = load_video(url, Limits())
    pictures = [Image.fromarray(frame) for frame in frames]
    return Video(pictures, sampling.fps, sampling.indices, sampling.total)


@torch.no_grad()
def chat_answer(
    folder: Path, urls: list[str], question: str, spec: dict[str, Any]
) -> tuple[str, int, Any]:
    """Return what a server must answer to a user's message with media and a question.

    Parameters
    ----------
    folder
        Folder of the model.
    urls, question
        Media as `data:` URLs, and the text behind them.
    spec
        Arguments of `tokencomp.patch`.

    Returns
    -------
    str
        The greedy answer of 8 tokens.
    int
        Number of tokens of the uncompressed prompt.
    Stats
        Statistics of the compression.
    """
    model, processor = load(folder)
    media = [
        _clip(url) if url.startswith("data:video") else load_image(url, Limits()) for url in urls
    ]
    inputs = build_inputs(processor, [media], [question])
    n = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, **spec) as handle:
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.tokenizer.decode(out[0, n:], skip_special_tokens=True), n, handle.stats


def decoder_inputs(model: Any, inputs: Any) -> dict[str, Any]:
    """Return what the decoder of an unpatched model gets: embeddings and positions."""
    decoder, seen = model.model.language_model, {}
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen


@torch.no_grad()
def answer_of_kept(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Return what `answer` does for the reducer "uniform", without `tokencomp.patch`.

    The unpatched decoder runs on the kept rows of its own inputs, at their own positions. Those of
    a job that merges are means.
    """
    model, _ = load(folder)
    inputs = inputs_of(folder, job)
    seen = decoder_inputs(model, inputs)
    x = seen["inputs_embeds"].clone()
    rows, sizes = uniform_rows(model, inputs, x[0], job["tokencomp"])
    positions = seen["position_ids"][..., rows]
    return {**greedy(model, x[:, rows], positions, sizes[rows], job), "kept": rows}


def uniform_rows(
    model: Any, inputs: Any, x: torch.Tensor, spec: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that "uniform" keeps of a prompt, and the sizes of all rows.

    Where a job merges, kept rows of `x` (n, d) become means, in place.
    """
    sizes, ratio, keep = torch.ones(x.shape[0]), spec["ratio"], []
    kinds, config = inputs["mm_token_type_ids"][0], model.config
    for i, kind in enumerate(("image", "video"), start=1):
        removed = ratio.get(kind, 0.0) if isinstance(ratio, dict) else ratio
        columns = (kinds == i).nonzero()[:, 0]
        for t, h, w in inputs.get(f"{kind}_grid_thw", torch.empty(0, 3)).tolist():
            spans = int(t) if config.model_type.startswith("glm") else 1  # every frame is a span
            n = int(t * h * w) // config.vision_config.spatial_merge_size**2 // spans
            kept = max(int(n * (1 - removed) + 0.5), 1)
            for _ in range(spans):
                stays = [int(columns[int((i + 0.5) * n / kept)]) for i in range(kept)]
                if spec.get("merge"):
                    merge(x, sizes, columns[:n].tolist(), stays)
                keep += stays
                columns = columns[n:]
    return torch.tensor(sorted([*(kinds == 0).nonzero()[:, 0].tolist(), *keep])), sizes


@torch.no_grad()
def answer_of_pieces(folder: Path, job: dict[str, Any], marks: Sequence[str]) -> dict[str, Any]:
    """Return what `answer` does, of media that transformers takes in no common prompt.

    The prompt is cut after every medium. Embeddings of the pieces, and positions where they have
    gaps, come from the unpatched model, and the kept tokens of a piece from `uniform_rows` or from
    `tokencomp.patch`. The decoder runs on all pieces.
    """
    model, processor = load(folder)
    *parts, question = re.split(
        "|".join(f"(?<={re.escape(mark)})" for mark in marks), job["prompt"]
    )
    spec, pieces, positions = job["tokencomp"], [], []
    gaps, begin = model.config.model_type.startswith("glm"), 0
    for text, item in zip(parts, job["media"], strict=True):
        inputs = inputs_of(folder, {**job, "prompt": text, "media": [item]})
        seen, ratio = decoder_inputs(model, inputs), spec["ratio"]
        ratio = ratio.get(item[0], 0.0) if isinstance(ratio, dict) else ratio
        x = seen["inputs_embeds"]
        rows = torch.arange(x.shape[1])
        if gaps:
            rows, _ = uniform_rows(model, inputs, x[0], {"ratio": ratio})
        elif ratio:
            with tokencomp.patch(model, ratio, reducer=spec["reducer"], merge=False) as handle:
                model(**inputs)
                rows = torch.tensor(columns(handle.stats))
        pieces.append(x[:, rows])
        at = seen["position_ids"] if gaps else torch.arange(len(rows))[None]
        positions.append((at[..., rows] if gaps else at) + begin)
        begin += int(at.max()) + 1  # also behind tokens that are dropped
    ids = processor.tokenizer(question, return_tensors="pt")["input_ids"]
    x = torch.cat([*pieces, model.get_input_embeddings()(ids)], dim=1)
    last = torch.arange(ids.shape[1]).expand(*positions[0].shape[:-1], -1) + begin
    return greedy(model, x, torch.cat([*positions, last], dim=-1), torch.ones(x.shape[1]), job)


def answer_of_merged(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a job with merging at positions without gaps, which `patch` refuses.

    Of `tokencomp.patch` it takes the tokens that stay. Means and weights are computed here, and the
    unpatched decoder runs on the rows, with the logarithm of the weights in its mask.
    """
    return merged_at_compact(load(folder)[0], inputs_of(folder, job), job)


@torch.no_grad()
def merged_at_compact(model: Any, inputs: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Return what `answer_of_merged` does, of a model and the processor's output."""
    spec = job["tokencomp"]
    x = decoder_inputs(model, inputs)["inputs_embeds"].clone()
    with tokencomp.patch(model, spec["ratio"], reducer=spec["reducer"], merge=False) as handle:
        model(**inputs)
        stats = handle.stats
    sizes = torch.ones(x.shape[1])
    for span, kept in zip(stats.spans[0], stats.kept(0)[-1], strict=True):
        patches = [span.start + i for i in range(span.length) if i not in span.special]
        stays = [span.start + i for i in kept if i not in span.special]
        merge(x[0], sizes, patches, stays)
    rows = torch.tensor(columns(stats))
    return greedy(model, x[:, rows], torch.arange(len(rows))[None], sizes[rows], job)


def merge(x: torch.Tensor, sizes: torch.Tensor, patches: list[int], stays: list[int]) -> None:
    """Make every column that stays the mean of the patches that resemble it most, in place."""
    unit = torch.nn.functional.normalize(x, dim=1)
    members = {column: [column] for column in stays}
    for column in set(patches) - set(stays):
        members[stays[int((unit[stays] @ unit[column]).argmax())]].append(column)
    before = x.clone()
    for column, group in members.items():
        x[column], sizes[column] = before[group].mean(0), len(group)


def greedy(
    model: Any, x: torch.Tensor, positions: torch.Tensor, sizes: torch.Tensor, job: dict[str, Any]
) -> dict[str, Any]:
    """Return the answer of an unpatched decoder to rows (1, n, d) that weigh `sizes` (n,).

    It runs on the whole sequence again for every token.
    """
    decoder, tokens, logprobs, prompt = model.model.language_model, [], [], x.shape[1]
    for _ in range(job.get("tokens", 8)):
        n = x.shape[1]
        mask = torch.full((n, n), -torch.inf).triu(1) + sizes.log()
        hidden = decoder(
            inputs_embeds=x, position_ids=positions, attention_mask=mask[None, None],
            use_cache=False,
        )[0]  # fmt: skip
        scores = torch.log_softmax(model.lm_head(hidden[0, -1]).float(), -1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
        x = torch.cat([x, model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        sizes = torch.cat([sizes, torch.ones(1)])
    return {"tokens": tokens, "logprobs": logprobs, "prompt": prompt}


def columns(stats: Any) -> list[int]:
    """Return the columns of the uncompressed prompt that the last layer sees."""
    remaining = set(range(stats.lengths[0]))
    chosen = [stats.tower_kept(0), *stats.kept(0)][-1]
    for span, kept in zip(stats.spans[0], chosen, strict=True):
        remaining -= set(range(span.start, span.stop))
        remaining |= {span.start + k for k in kept}
    return sorted(remaining)


def grid_positions(
    ids: list[int], grids: list[tuple[int, int, int]], pads: tuple[int, ...], t_factor: float
) -> torch.Tensor:
    """Compute M-RoPE positions (3, n) in plain loops.

    The token after media has the position after the largest one of the media. Recent releases of
    transformers use base + max(h, w) instead, which for long videos is a position inside the video;
    engines and the training of the models use the maximum.
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
    """Return `grid_positions` of a job's uncompressed prompt; in Qwen3-VL each frame is a grid."""
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
    """Let the model use `true_positions` instead of those of its transformers release."""
    model, _ = load(folder)
    positions = true_positions(folder, job)
    delta = positions.max() + 1 - positions.shape[1]
    own = model.model.get_rope_index

    @functools.wraps(own)
    def get_rope_index(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] != positions.shape[1]:  # a call with another prompt
            return own(input_ids, *args, **kwargs)
        return positions[:, None], delta[None, None]

    model.model.get_rope_index = get_rope_index
    try:
        yield
    finally:
        del model.model.get_rope_index
