"""What a new user prints, misspells and passes."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import support.family
from support.embedded import folder, loaded
from support.family.base import Family

import tokencomp
from tokencomp.zoo import SAMPLES

__all__ = ["folder", "loaded"]
USAGE = Path(__file__).parents[1] / "docs" / "usage.md"


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
