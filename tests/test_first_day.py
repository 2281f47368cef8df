"""What a new user prints, misspells and passes."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import support.family
import torch
from PIL import Image
from support import matrix
from support.embedded import folder, loaded
from support.families import FAMILIES, text
from support.family.base import Family

import tokencomp
from tokencomp import errors
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.video import Video
from tokencomp.reducers import ScoreReducer
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


PICTURE = Image.new("RGB", (56, 56))


@pytest.mark.parametrize(
    ("media", "questions", "message"),
    [
        (PICTURE, ["What?"], r"media Image where a row was expected.*\[\[picture\]\]"),
        ([PICTURE], ["What?"], "media Image where a row was expected"),
        ([Video([PICTURE] * 4)], ["What?"], "media Video where a row was expected"),
        ([[PICTURE]], "What?", "one text for 1 rows of media. Give a list"),
        ([[PICTURE]], ["What?", "Where?"], "2 texts for 1 rows of media"),
        ([["page.png"]], ["What?"], r"'page.png' is a path.*load_media\('page.png'\)"),
        ([[Path("clip.mp4")]], ["What?"], r"load_media\('clip.mp4'\)"),
        ("page.png", ["What?"], "'page.png' is a path"),
    ],
    ids=lambda value: type(value).__name__,  # texts of pictures have addresses
)
def test_build_inputs_says_what_it_takes(
    media: Any, questions: Any, message: str, loaded: Any
) -> None:
    with pytest.raises((errors.MediaError, errors.OptionError), match=f"build_inputs: .*{message}"):
        build_inputs(loaded[1], media, questions)


@pytest.mark.parametrize("name", errors.ELSEWHERE)
def test_names_of_other_libraries_get_the_equivalent(name: str) -> None:
    """The page names each of them, and what the message offers runs."""
    owner, here = errors.ELSEWHERE[name]
    page = USAGE.with_name("coming-from.md").read_text(encoding="utf-8")
    model = FAMILIES["qwen2_vl"].build()
    given = {"reducer": name} if name == "tome" else {name: 8}
    with pytest.raises((errors.OptionError, errors.UnknownNameError)) as refused:
        tokencomp.patch(model, **given)
    assert f"What {owner} calls {name!r} is {here} here" in str(refused.value)
    assert owner in page and f"`{name.replace('_', '-')}" in page.replace("--", "").replace(
        "_", "-"
    )
    assert tokencomp.patch(model, **eval(f"dict({here})")).plan.active


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tower_ratio": "Auto"}, 'tower_ratio=0.5, or "auto"'),
        ({"tower_ratio": 0.6}, r"ratio=0.5 \(the default\).*Give a ratio of 0.6 or more"),
        ({"bugdet": 512}, "Did you mean 'budget'"),
        ({"reducer": "condiv", "powr": 1.0}, "Did you mean 'power'"),
        ({"reducer": "condiv+prune", "powr": 1.0}, "Did you mean 'power'"),
    ],
)
def test_slips_of_options_name_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.TokenCompError, match=message):
        tokencomp.patch(FAMILIES["qwen2_vl"].build(), **arguments)


class Broken(ScoreReducer):
    """A reducer of a user that divides by zero."""

    def scores(self, tokens: tokencomp.Tokens) -> torch.Tensor:
        return tokens.features[:, 0] / 0


def test_a_reducers_own_nan_is_not_blamed_on_the_model() -> None:
    given = matrix.tokens((1, 4, 4))
    with pytest.raises(errors.ScoreError, match=r"'Broken' returned .* with NaN.*its `scores`"):
        Broken().reduce(given)
    given.features[3] = torch.nan
    with pytest.raises(errors.ScoreError, match="have overflowed"):
        Broken().reduce(given)


def test_an_embedder_is_patched_inside() -> None:
    embedder = torch.nn.Sequential()
    embedder.transformers_model = FAMILIES["qwen2_vl"].build()
    with pytest.raises(errors.UnsupportedModelError, match=r"embedder\.transformers_model"):
        tokencomp.patch(embedder, 0.5)


@pytest.mark.parametrize("whole_first", [False, True])
def test_a_patch_of_the_body_is_undone_with_the_model(whole_first):
    """And the other way round."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch([[text(4), family.image(), text(3)]])
    with torch.no_grad():
        before = model(**inputs).logits
        patched, undone = (model, model.model) if whole_first else (model.model, model)
        tokencomp.patch(patched, 0.5)
        assert not torch.equal(model(**inputs).logits, before)
        tokencomp.unpatch(undone)
        assert torch.equal(model(**inputs).logits, before)
