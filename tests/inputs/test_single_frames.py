"""Frames that a plan drops whole, in families whose towers take frames one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.errors import SpanError
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import build_inputs, generate

T, QUESTION = 8, "What color is the circle?"
MODELS = ("tiny-llava-onevision", "tiny-vila")


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return load_model(request.param, device="cpu")


def clip(seed: int = 0) -> list[Image.Image]:
    """A video of noise whose frames differ in brightness by ever other amounts."""
    random = np.random.default_rng(seed)
    levels = random.permutation(T) * 200 // T
    noise = random.integers(0, 56, (T, 84, 112, 3))
    return [Image.fromarray((n + b).astype(np.uint8)) for n, b in zip(noise, levels, strict=True)]


def brightest(video: list[Image.Image], count: int) -> list[int]:
    """The frames that k-centre takes: greedy in plain loops, on the mean brightness."""
    looks = [float(np.asarray(frame).mean()) for frame in video]
    chosen = [max(range(T), key=lambda i: abs(looks[i] - sum(looks) / T))]
    while len(chosen) < count:
        rest = [i for i in range(T) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(abs(looks[i] - looks[j]) for j in chosen)))
    return sorted(chosen)


def plan(model: Any, name: str, fraction: float, **options: Any) -> Plan:
    """With what a stage in the tower must know of the model."""
    entry = Stage(0, fraction / 2, make_reducer("condiv"))
    chosen = Plan((entry,), TowerStage(0, fraction, make_reducer(name, **options)))
    with tokencomp.patch(model, plan=chosen) as handle:
        return handle.plan


def pixels(inputs: dict[str, Tensor]) -> Tensor:
    """(frames of all videos, 3, height, width)."""
    values = inputs["pixel_values_videos"]
    return values.flatten(0, -4) if values.ndim > 4 else values


def features(model: Any, values: Tensor, videos: int) -> Tensor:
    """What the tower and the projector make of videos: (frames, tokens, d)."""
    with torch.no_grad():
        if hasattr(model, "encode_videos"):
            out = model.encode_videos(values, [len(values) // videos] * videos)
        else:
            config = model.config
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            how = {name: getattr(config, name) for name in names}  # releases before 5 need them
            out = model.model.get_video_features(values.unflatten(0, (videos, -1)), **how)
    out = getattr(out, "pooler_output", out)
    out = torch.cat(list(out)) if isinstance(out, (list, tuple)) else out
    rows, frames = out.reshape(videos, -1, out.shape[-1]), len(values) // videos
    rows = rows[:, : rows.shape[1] // frames * frames]  # without the line break behind a video
    return rows.reshape(len(values), -1, out.shape[-1])


def counted(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the frames that are normalised, and those that the first block of the tower sees."""
    counts = {"processed": 0, "seen": 0}
    inner = getattr(processor, "video_processor", None) or processor.image_processor
    original = type(inner).rescale_and_normalize

    def count(self: Any, images: Tensor, *args: Any, **kw: Any) -> Any:
        counts["processed"] += int(np.prod(images.shape[:-3]))
        return original(self, images, *args, **kw)

    monkeypatch.setattr(type(inner), "rescale_and_normalize", count)
    tower = model.vision_tower if hasattr(model, "vision_tower") else model.model.vision_tower
    block = getattr(tower, "vision_model", tower).encoder.layers[0]

    def see(module: Any, args: Any, kwargs: Any) -> None:
        counts["seen"] += len(args[0] if args else kwargs["hidden_states"])

    block.self_attn.register_forward_pre_hook(see, with_kwargs=True)
    return counts


def test_whole_frames_are_what_they_are_among_all(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of eight frames stay whole: frames do not see each other, so their tokens are equal."""
    model, processor = loaded
    videos = [clip(0), clip(1)]
    media, prompts = [[v] for v in videos], [QUESTION] * 2
    whole = build_inputs(processor, media, prompts)
    expected = features(model, pixels(whole), 2)
    chosen = plan(model, "keyframes", 3 / T, slack=1.0)
    counts = counted(model, processor, monkeypatch)
    short = build_inputs(processor, media, prompts, chosen)
    assert counts["processed"] == 2 * 3
    assert all(torch.equal(whole[k], short[k]) for k in whole if k != "pixel_values_videos")
    stay = torch.tensor([i in brightest(v, 3) for v in videos for i in range(T)])
    assert torch.equal(pixels(short)[stay], pixels(whole)[stay])
    assert pixels(short)[~stay].isnan().all()
    with tokencomp.patch(model, plan=chosen) as handle:
        counts["seen"] = 0
        got = features(model, pixels(short), 2)
        assert counts["seen"] == 2 * 3
        generate(model, processor, short, 2)
        spans, left = handle.stats.spans, [handle.stats.tower_kept(b)[0] for b in range(2)]
        assert handle.stats.tower_ratio == pytest.approx(1 - 3 / T)
    assert torch.allclose(got[stay], expected[stay], atol=1e-5)
    assert got[~stay].isnan().all()
    for b, video in enumerate(videos):
        t, h, w = spans[b][0].grid
        special = set(spans[b][0].special)
        patches = [i for i in range(spans[b][0].length) if i not in special]
        frames = {patches.index(i) // (h * w) for i in left[b] if i not in special}
        assert t == T and sorted(frames) == brightest(video, 3)


AVERAGES = {"contrast": 0, "change": 0}  # what keyframes compares


def test_frames_that_stay_share_the_budget(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight frames, half of each: as a video of these two under k-centre at one half."""
    model, processor = loaded
    video = clip()
    fraction = 1 / T
    chosen = plan(model, "keyframes", fraction, slack=2.0)
    counts = counted(model, processor, monkeypatch)
    short = build_inputs(processor, [[video]], [QUESTION], chosen)
    numbers = brightest(video, 2)
    with tokencomp.patch(model, plan=chosen):
        got = features(model, pixels(short), 1)
        assert counts["seen"] == 2
    with tokencomp.patch(
        model, plan=Plan((), TowerStage(0, 0.5, make_reducer("kcentre", **AVERAGES)))
    ):
        alone = features(model, pixels(short)[numbers], 1)
    assert alone.isnan().any() and not alone.isnan().all()
    assert torch.allclose(got[numbers], alone, atol=1e-5, equal_nan=True)
    rest = [i for i in range(T) if i not in numbers]
    assert got[rest].isnan().all()


def test_evenly_spaced_frames_need_no_plan_for_the_prompt(loaded: Any) -> None:
    model, processor = loaded
    inputs = build_inputs(processor, [[clip()]], [QUESTION])
    chosen = plan(model, "keyframes", 2 / T, slack=1.0, by="even")
    with tokencomp.patch(model, plan=chosen):
        got = features(model, pixels(inputs), 1)
    assert [not frame.isnan().any() for frame in got] == [i in (2, 6) for i in range(T)]


def test_prompts_with_other_frames_are_refused(loaded: Any) -> None:
    model, processor = loaded
    chosen, other = (plan(model, "keyframes", n / T, slack=1.0) for n in (2, 4))
    with tokencomp.patch(model, plan=chosen), torch.no_grad():
        with pytest.raises(SpanError, match="pixels of all frames"):
            model(**build_inputs(processor, [[clip()]], [QUESTION]))
        with pytest.raises(SpanError, match="made for another plan"):
            model(**build_inputs(processor, [[clip()]], [QUESTION], other))


def test_images_are_chosen_by_k_centre(loaded: Any) -> None:
    """An image has one frame."""
    model, processor = loaded
    inputs = build_inputs(processor, [[clip()[0]]], [QUESTION])
    kept = []
    for name, options in (("keyframes", {}), ("kcentre", AVERAGES)):
        with tokencomp.patch(model, plan=plan(model, name, 0.5, **options)) as handle:
            generate(model, processor, inputs, 1)
            kept.append(handle.stats.tower_kept(0))
    assert kept[0] == kept[1] and len(kept[0][0])
