"""What a new user prints, misspells and passes."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.family
import torch
from PIL import Image
from support.embedded import folder, loaded
from support.family.base import Family

import tokencomp
from tokencomp.errors import MediaError, OptionError
from tokencomp.inputs.media import is_video, load_media
from tokencomp.inputs.prompts import build_inputs
from tokencomp.zoo import SAMPLES

__all__ = ["folder", "loaded"]
USAGE = Path(__file__).parents[1] / "docs" / "usage.md"


@pytest.fixture
def inputs(loaded: Any) -> dict[str, Any]:
    image = Image.fromarray(np.arange(112 * 112 * 3, dtype=np.uint8).reshape(112, 112, 3))
    return build_inputs(loaded[1], [[image]], ["What is it?"])


@pytest.mark.parametrize(
    ("change", "asked", "share"),
    [
        ({}, "ratio 0.75 (kcenter at entry)", 0.25),
        ({"ratio": {"image": "0.5"}}, "ratio image=0.5 (kcenter at entry)", 0.5),
        ({"budget": 8}, "budget=8 (kcenter at entry)", 0.5),
        (
            {"plan": [{"layer": k, "fraction": 1 - k / 4, "reducer": "prune"} for k in (1, 2)]},
            "plan (prune before layers 1, 2)",
            (1 + 0.75 + 4 * 0.5) / 6,
        ),
    ],
    ids=["patch", "by modality", "budget", "plan"],
)
def test_a_handle_says_what_was_asked_for_and_what_happened(loaded, inputs, change, asked, share):
    model = loaded[0]
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with tokencomp.patch(model, 0.75, reducer="kcenter") as handle, torch.no_grad():
        if change:
            handle.set(**change)
        model(**inputs)
        assert f"{asked}: {visual} → {visual * share:.0f} visual tokens" in repr(handle)
    assert "removed" in repr(handle)


def test_stats_of_a_prompt_of_text_are_empty(loaded, inputs):
    model, processor = loaded
    with tokencomp.patch(model, 0.5) as handle, torch.no_grad():
        assert not handle.stats and handle.stats.summary()["tokens_before"] == []
        model(**inputs)
        assert handle.stats
        model(**processor(text=["hello"], return_tensors="pt"))
        assert not handle.stats
        empty = handle.stats.summary()
        assert (empty["ratio"], empty["flops_before"], empty["tokens_after"]) == (0.0, 0, [])


@pytest.mark.parametrize(
    "given, meant",
    [
        ({"keep_ratio": 0.5}, "Did you mean ratio? It is the share that is removed"),
        ({"max_tokens": 512}, "Did you mean budget?"),
        ({"method": "divprune"}, "Did you mean reducer?"),
        ({"zzz": 1}, "has no option 'zzz'. It has: "),
    ],
)
def test_misspelt_arguments(loaded, given, meant):
    model = loaded[0]
    with pytest.raises(OptionError, match=re.escape(meant)):
        tokencomp.patch(model, **given)
    with tokencomp.patch(model, 0.5) as handle, pytest.raises(OptionError, match=re.escape(meant)):
        handle.set(**given)


def test_a_huge_picture_is_one_message(tmp_path, monkeypatch):
    Image.new("1", (400, 400)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # more than twice as many are refused
    assert not is_video(tmp_path / "huge.png")
    with pytest.raises(MediaError, match=r"huge\.png: the image is too large; make it smaller"):
        load_media(tmp_path / "huge.png")


def test_the_lines_about_a_video_run_as_they_stand(loaded, tmp_path, monkeypatch):
    pages = re.findall(r"```python\n(.*?)```", USAGE.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = [code for code in pages if "clip.mp4" in code]
    sample = SAMPLES / "test-needle-00001.mp4"
    (tmp_path / "clip.mp4").write_bytes(sample.read_bytes())
    monkeypatch.chdir(tmp_path)
    known = {"tokencomp": tokencomp, "model": loaded[0], "processor": loaded[1]}
    exec(lines, known)
    assert len(known["clip"]) == 8 and "pixel_values_videos" in known["inputs"]
    with tokencomp.patch(loaded[0], 0.5) as handle:
        loaded[0].generate(**known["inputs"], max_new_tokens=2)
        assert handle.stats.ratio == pytest.approx(0.5, abs=0.05)


def test_every_family_of_the_tests_is_listed_in_a_suite():
    """A subclass of `Family` that is in no list runs no test."""
    for module in pkgutil.iter_modules(support.family.__path__):
        importlib.import_module(f"support.family.{module.name}")
    tests = "\n".join(f.read_text() for f in Path(__file__).parent.rglob("*.py"))
    classes, named = list(Family.__subclasses__()), set()
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if cls.__module__.startswith("support.family.") and "name" in vars(cls):
            named.add(cls.__name__)
    assert len(named) > 20
    assert not {name for name in named if not re.search(rf"\b{name}\(\)", tests)}
