"""Equal-token baselines against all sizes that could have been chosen."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from PIL import Image

from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.baselines import STRETCH, EqualTokens, faster, has_budget, native_budget

Size = tuple[int, int]


def counter(loaded, prefer: str = "downscale") -> EqualTokens:
    model, processor = loaded
    return EqualTokens(processor, list(adapter_for(model).placeholders), prefer)


def every_size(width: int, height: int) -> list[Size]:
    """Sizes of at least 8 pixels, 4 apart, proportions as near to the picture's as those tried."""
    found = []
    for k, stretch in itertools.product(range(max(width, height), 7, -4), STRETCH):
        scale = k / max(width, height)
        size = (round(width * scale * stretch), round(height * scale / stretch))
        found += [size] if min(size) >= 8 else []
    return found


@pytest.mark.parametrize("size", [(224, 224), (280, 168)])
def test_no_size_comes_nearer_or_shows_more(loaded, size: Size) -> None:
    equal, image = counter(loaded), Image.new("RGB", size)
    largest: dict[int, int] = {}
    for one in every_size(*size):
        n = equal.tokens(Image.new("RGB", one))
        largest[n] = max(largest.get(n, 0), one[0] * one[1])
    full = equal.tokens(image)
    for ratio in (0.5, 0.67, 0.75, 0.9):
        found = equal.shrink(image, ratio)
        n, target = equal.tokens(found), max(1, round(full * (1 - ratio)))
        assert abs(n - target) == min(abs(other - target) for other in largest)
        assert found.width * found.height >= 0.97 * largest[n]


def test_below_the_processors_minimum_the_largest_picture_of_the_fewest_tokens(loaded) -> None:
    """Four tokens are the fewest, which 4 pixels a side give, and 70 as well."""
    equal, image = counter(loaded), Image.new("RGB", (224, 224))
    for media in (image, [image] * 8):
        found = equal.shrink(media, 0.95)
        picture = found[0] if isinstance(found, list) else found
        assert equal.tokens(found) == (4 if found is picture else 16) and picture.size == (70, 70)
    assert equal.tokens(Image.new("RGB", (4, 4))) == 4


class Made(EqualTokens):
    """Tokens by a formula instead of a processor."""

    def __init__(self, per_frame, prefer: str = "downscale", pair: int = 1) -> None:
        super().__init__(None, [], prefer)
        self.per_frame, self.pair = per_frame, pair

    def tokens(self, media) -> int:
        frames = media if isinstance(media, list) else [media]
        return self.per_frame(*frames[0].size) * -(-len(frames) // self.pair)


def test_media_of_a_fixed_number_of_tokens_are_not_blurred_for_nothing() -> None:
    """VILA and LLaVA-1.5 resize every image to one square: only videos can give fewer tokens."""
    image, fixed = Image.new("RGB", (64, 48)), Made(lambda w, h: 49)
    assert fixed.shrink(image, 0.75) is image
    assert len(fixed.shrink([image] * 8, 0.75)) == 2


def test_a_clip_of_small_frames_keeps_its_frames() -> None:
    """16 frames of 16 pixels a side have as many tokens together as one frame has pixels."""
    equal = Made(lambda w, h: max(1, w // 4) * max(1, h // 4))
    video = [Image.new("RGB", (16, 16))] * 16
    found = equal.shrink(video, 0.75)
    assert len(found) == 16 and equal.tokens(found) == 64


@pytest.mark.parametrize("frames, ratio", [(8, 0.5), (8, 0.9), (8, 0.625), (7, 0.75), (16, 0.6)])
def test_of_as_many_tokens_most_frames(frames: int, ratio: float) -> None:
    """Frames count in pairs: an odd one could have had a companion for nothing."""
    equal = Made(lambda w, h: 10, "fewer_frames", pair=2)
    video = [Image.new("RGB", (8, 8))] * frames
    target = max(1, round(equal.tokens(video) * (1 - ratio)))
    counts = {n: abs(equal.tokens(video[:n]) - target) for n in range(1, frames + 1)}
    best = max(n for n in counts if counts[n] == min(counts.values()))
    fewest = min(equal.tokens(video[:n]) for n in counts if counts[n] == min(counts.values()))
    found = equal.shrink(video, ratio)
    assert equal.tokens(found) == fewest
    assert len(found) == max(n for n in counts if equal.tokens(video[:n]) == fewest) <= best


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_faster_sounds_are_as_loud_and_higher(share: float) -> None:
    """A tone comes out with as many swings in fewer samples; what would be too high is left out."""
    t = np.arange(1600)
    tone = np.sin(2 * np.pi * 0.02 * t).astype(np.float32)
    high = np.sin(2 * np.pi * 0.49 * t).astype(np.float32)
    kept = np.arange(round(1600 * share))
    expected = np.sin(2 * np.pi * 0.02 / share * kept)
    for sound in (tone, tone + high):
        out = faster(sound, share)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ImageProcessor"), reason="needs Gemma 4")
@pytest.mark.parametrize(("ratio", "budget"), [(0.5, 140), (0.625, 70), (0.75, 70), (0.9, 70)])
def test_the_nearest_budget_is_taken_and_given_back(ratio, budget):
    kind = transformers.Gemma4ImageProcessor
    processor, image = SimpleNamespace(image_processor=kind()), Image.new("RGB", (400, 300))
    by_hand = kind(max_soft_tokens=budget)([image], return_tensors="pt")
    assert has_budget(processor)
    with native_budget(processor, ratio) as taken:
        inside = processor.image_processor([image], return_tensors="pt")
    name = "num_soft_tokens_per_image"
    assert taken == budget and inside[name].tolist() == by_hand[name].tolist()
    assert inside["pixel_values"].equal(by_hand["pixel_values"])
    assert processor.image_processor.max_soft_tokens == 280


def test_both_ends_of_a_budget_are_given_back() -> None:
    """LFM2-VL's processor has a least number of tokens too, which a small budget lowers."""
    images = SimpleNamespace(max_image_tokens=256, min_image_tokens=64)
    with native_budget(SimpleNamespace(image_processor=images), 0.9) as taken:
        assert taken == 26 and vars(images) == {"max_image_tokens": 26, "min_image_tokens": 26}
    assert vars(images) == {"max_image_tokens": 256, "min_image_tokens": 64}
