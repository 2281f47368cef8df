"""Frames that a plan drops whole are not processed, and the answer is as if they had been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.errors import SpanError, TokenCompError
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.inputs.video import Video
from tokencomp.reducers.keyframes import KeyFrames

T, QUESTION = 8, "What color is the circle?"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("tiny-qwen2-vl", device="cpu")


def clip(frames: int = 2 * T, seed: int = 0) -> list[Image.Image]:
    """A video of noise whose frames differ in brightness by ever other amounts."""
    random = np.random.default_rng(seed)
    levels = random.permutation(frames) * 200 // frames
    noise = random.integers(0, 56, (frames, 84, 112, 3))
    return [Image.fromarray((n + b).astype(np.uint8)) for n, b in zip(noise, levels, strict=True)]


def counted(processor: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the frames that the video processor resizes and normalises."""
    counts = {"resize": 0, "rescale_and_normalize": 0}
    kind = type(processor.video_processor)
    for name in counts:
        original = getattr(kind, name)

        def count(self: Any, *args: Any, _name: str = name, _of: Any = original, **kw: Any) -> Any:
            videos = args[0] if args else kw["videos"]
            counts[_name] += int(np.prod(videos.shape[:-3]))
            return _of(self, *args, **kw)

        monkeypatch.setattr(kind, name, count)
    return counts


def plan(reducer: Any, fraction: float = 0.3) -> Plan:
    entry = Stage(0, fraction / 2, make_reducer("condiv"))
    return Plan((entry,), TowerStage(0, fraction, reducer))


def greedy(looks: np.ndarray, count: int) -> list[int]:
    """k-centre in plain loops."""

    def far(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).mean()))

    chosen = [max(range(len(looks)), key=lambda i: far(looks[i], looks.mean(0)))]
    while len(chosen) < count:
        rest = [i for i in range(len(looks)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(far(looks[i], looks[j]) for j in chosen)))
    return sorted(chosen)


@dataclass(frozen=True)
class Given(KeyFrames):
    """Frames that somebody else has chosen, of prompts with pixels of all frames."""

    numbers: tuple[int, ...] = ()

    def _chosen(self, patches: Any, counts: list[int], first: torch.Tensor) -> torch.Tensor:
        assert not patches.features.isnan().any() and set(counts) == {len(self.numbers)}
        starts = np.cumsum([0] + [t for t, _, _ in patches.batch.grids])[:-1]
        return torch.tensor([start + number for start in starts for number in self.numbers])


@pytest.mark.parametrize("by", ["thumbnails", "even"])
def test_the_answer_is_that_of_all_frames(
    loaded: Any, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two videos in one batch, of which one has an odd number of frames."""
    model, processor = loaded
    videos = [clip(), clip(2 * T - 1, seed=1)]
    media, prompts = [[v] for v in videos], [QUESTION] * 2
    whole = build_inputs(processor, media, prompts)
    chosen = plan(make_reducer("keyframes", by=by, slack=1.0))
    counts = counted(processor, monkeypatch)
    short = build_inputs(processor, media, prompts, chosen)
    kept = -(-3 * T // 10)  # rows of the grid in time, of two frames each
    assert counts == {"resize": 2 * 2 * kept, "rescale_and_normalize": 2 * 2 * kept}
    assert all(torch.equal(whole[k], short[k]) for k in whole if k != "pixel_values_videos")
    with tokencomp.patch(model, plan=chosen) as handle:
        ours = generate(model, processor, short, 8)
        spans, left = handle.stats.spans, [handle.stats.tower_kept(b)[0] for b in range(2)]
    for b, video in enumerate(videos):
        there = whole["pixel_values_videos"].view(2, T, -1)[b]
        pixels = short["pixel_values_videos"].view(2, T, -1)[b]
        _, h, w = spans[b][0].grid
        numbers = sorted({offset // (h * w) for offset in left[b]})
        expected = _frames(video, by, kept)
        assert numbers == expected
        assert torch.equal(pixels[expected], there[expected])
        assert pixels.isnan().all(1).tolist() == [i not in expected for i in range(T)]
        # A reducer that is handed these frames, on pixels of all of them.
        alone = build_inputs(processor, [[video]], [QUESTION])
        given = plan(Given(slack=1.0, numbers=tuple(expected)))
        with tokencomp.patch(model, plan=given) as handle:
            assert generate(model, processor, alone, 8) == [ours[b]]
            assert handle.stats.tower_kept(0)[0] == left[b]


@pytest.mark.parametrize("fps", [None, 2.0])
def test_times_of_frames_are_those_of_the_whole_video(loaded: Any, fps: float | None) -> None:
    """Qwen2.5-VL writes seconds per row of the grid, from the rate of the video."""
    old = loaded[1]
    processor = transformers.Qwen2_5_VLProcessor(
        old.image_processor, old.tokenizer, old.video_processor, chat_template=old.chat_template
    )
    media, chosen = [[Video(clip(), fps=fps)]], plan(make_reducer("keyframes"))
    whole = build_inputs(processor, media, [QUESTION])
    short = build_inputs(processor, media, [QUESTION], chosen)
    assert short.keys() == whole.keys() and "second_per_grid_ts" in whole
    pixels = "pixel_values_videos"
    assert short[pixels].isnan().any() and not whole[pixels].isnan().any()
    for name in whole.keys() - {pixels}:
        first, second = torch.as_tensor(short[name]), torch.as_tensor(whole[name])
        assert torch.equal(first, second), name


@pytest.mark.parametrize("bound", ["none", "largest", "smallest"])
@pytest.mark.parametrize("count", [2 * T, 2 * T - 1])
def test_frames_of_qwen3_vl_have_the_size_that_they_have_among_all(
    count: int, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a frame depends on how many there are, and timestamps stand between them."""
    model, processor = load_model("tiny-qwen3-vl", device="cpu")
    sizes = {
        "none": (1, 10**8), "largest": (1, count * 64 * 96), "smallest": (count * 128 * 160, 10**8)
    }  # fmt: skip
    low, high = sizes[bound]
    monkeypatch.setattr(
        processor.video_processor, "size", {"shortest_edge": low, "longest_edge": high}
    )
    media, chosen = [[Video(clip(count), fps=4.0)]], plan(make_reducer("keyframes", slack=1.0))
    whole = build_inputs(processor, media, [QUESTION])
    counts = counted(processor, monkeypatch)
    short = build_inputs(processor, media, [QUESTION], chosen)
    kept = -(-3 * T // 10)
    assert counts == {"resize": 2 * kept, "rescale_and_normalize": 2 * kept}
    pixels = "pixel_values_videos"
    for name in whole.keys() - {pixels}:
        assert torch.equal(torch.as_tensor(short[name]), torch.as_tensor(whole[name])), name
    there = ~short[pixels].isnan().any(1)
    assert torch.equal(short[pixels][there], whole[pixels][there])
    numbers = sorted({i * T // len(there) for i in there.nonzero()[:, 0].tolist()})
    assert numbers == _frames(media[0][0], "thumbnails", kept)
    assert int(there.sum()) == kept * len(there) // T
    with tokencomp.patch(model, plan=chosen) as handle:
        generate(model, processor, short, 2)
        left = handle.stats.tower_kept(0)[0]
    assert left and handle.stats.tower_ratio == pytest.approx(0.7, abs=0.02)


def _frames(video: list[Image.Image], by: str, count: int) -> list[int]:
    if by == "even":
        return [int((k + 0.5) * T / count) for k in range(count)]
    means = [np.asarray(frame, dtype=np.float64).mean() for frame in video]
    means = [*means, means[-1]][: 2 * T]
    return greedy(np.array(means).reshape(T, 2), count)


def test_equal_frames_are_processed_once(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that shows three pictures in turn; at any ratio, pixels are those of all frames."""
    _, processor = loaded
    shown = [clip(2, seed=s) for s in range(3)]
    video = [frame for s in (0, 0, 1, 1, 0, 2, 2, 2) for frame in shown[s]]
    stacked = np.stack([np.asarray(frame) for frame in video])
    expected = processor.video_processor([stacked], do_sample_frames=False, return_tensors="pt")
    counts = counted(processor, monkeypatch)
    inputs = build_inputs(processor, [[video]], [QUESTION])
    assert counts["resize"] == 6
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(inputs["video_grid_thw"], expected["video_grid_thw"])


@pytest.mark.parametrize("capped", [False, True])
def test_processors_that_share_a_budget_among_frames_process_all(
    loaded: Any, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cap per frame depends on their number, and then none is left out, but marked."""
    _, processor = loaded
    monkeypatch.setattr(processor.video_processor, "cap_pixels_per_frame", capped, raising=False)
    chosen = plan(make_reducer("keyframes", slack=1.0))
    counts = counted(processor, monkeypatch)
    pixels = build_inputs(processor, [[clip()]], [QUESTION], chosen)["pixel_values_videos"]
    assert counts["resize"] == (2 * T if capped else 6)
    assert int(pixels.view(T, -1).isnan().all(1).sum()) == T - 3


def test_prompts_for_another_plan_are_refused(loaded: Any) -> None:
    model, processor = loaded
    media, prompts = [[clip()]], [QUESTION]
    chosen, other = (plan(make_reducer("keyframes"), fraction) for fraction in (0.3, 0.45))
    with tokencomp.patch(model, plan=chosen), torch.no_grad():
        with pytest.raises(SpanError, match="pixels of all frames"):
            model(**build_inputs(processor, media, prompts))
        with pytest.raises(SpanError, match="made for another plan"):
            model(**build_inputs(processor, media, prompts, other))
    short = build_inputs(processor, media, prompts, chosen)
    for options in ({"plan": plan(make_reducer("kcentre"))}, {"ratio": 0.5}):
        with tokencomp.patch(model, **options), torch.no_grad(), pytest.raises(TokenCompError):
            model(**short)
