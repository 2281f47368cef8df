"""The support table: pages, counts and the list come from the kept results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conformance.table import counts, markdown, worse
from tokencomp.adapters.verified import load, nearest, releases, verified_types
from tokencomp.conformance.checks import SCORED, TOLERANCE

REPOSITORY = Path(__file__).parents[2]
# The families of the ranking in docs/support.md: the types that stand for each.
RANKED = {
    "Qwen3.5": ("qwen3_5", "qwen3_5_moe"),
    "Gemma 4": ("gemma4", "gemma4_unified"),
    "Qwen3-VL": ("qwen3_vl", "qwen3_vl_moe"),
    "DeepSeek-OCR 2": ("deepseek_ocr2",),
    "MiniCPM-V 4.6": ("minicpmv4_6", "minicpmv4_7"),
    "Qwen2.5-VL": ("qwen2_5_vl",),
    "InternVL3.5": ("internvl",),
    "Muse Glimmer": ("muse_glimmer",),
    "Gemma 3": ("gemma3", "gemma3n"),
    "PaddleOCR-VL": ("paddleocr_vl",),
    "GLM-4.xV and GLM-OCR": ("glm4v", "glm4v_moe", "glm46v", "glm_ocr"),
    "Kimi-K2.5": ("kimi_k25",),
    "SmolVLM and Idefics3": ("smolvlm", "idefics3", "granite_docling"),
    "LFM2-VL": ("lfm2_vl", "lfm3_vl"),
    "Nemotron VL": ("nemotron_h_omni",),
}
NEWEST = releases()[-1]


@pytest.mark.parametrize("release", releases())
def test_pages_are_those_of_the_results(release: str) -> None:
    page = REPOSITORY / "docs" / "conformance" / f"transformers-{release}.md"
    assert page.read_text(encoding="utf-8") == markdown(load(release))


def test_counts_in_the_texts_are_those_of_the_results() -> None:
    images = counts(load(NEWEST), image_text=True)
    served = images["exact"] + images["entry only"]
    for name in ("README.md", "docs/support.md"):
        text = re.sub(r"\s+", " ", (REPOSITORY / name).read_text(encoding="utf-8"))
        assert f"{served} of the {sum(images.values())} image-text-to-text types" in text, name


def test_rows_of_the_comparison_are_those_of_both_runs() -> None:
    """With family files only, and now: types with images, other types, families."""
    types = load(NEWEST)["types"]
    folder = REPOSITORY / "docs" / "conformance"
    before = json.loads((folder / "before-structural-adapter.json").read_text())["types"]
    rows = []
    for status in (before, {name: row["status"] for name, row in types.items()}):
        passed = {name for name, s in status.items() if s in ("exact", "entry only")}
        images = [types[name]["image_text"] for name in passed]
        families = [passed.issuperset(family) for family in RANKED.values()]
        rows.append((sum(images), len(images) - sum(images), sum(families)))
    text = (REPOSITORY / "docs/support.md").read_text(encoding="utf-8")
    for old, new in zip(*rows, strict=True):
        assert f"| {old} | {new} |" in text


def test_measured_errors_are_below_the_tolerance() -> None:
    for release in releases():
        table = load(release)
        for name, row in table["types"].items():
            if row["status"] not in ("exact", "entry only"):
                continue
            errors = row["errors"]
            assert errors["identity"] == 0 and errors["effect"] >= table["least_effect"], name
            assert max(errors["entry"], errors["entry decode"]) <= table["tolerance"], name


def test_verified_types_follow_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "9.0.0")
    assert {"qwen2_vl", "mistral3"} <= verified_types()
    assert nearest("9.0.0") == NEWEST
    assert nearest("5.6.0") == releases()[0]


def test_a_type_that_does_worse_is_named() -> None:
    table = load(NEWEST)
    assert worse(table) == {}
    row: dict[str, Any] = {**table["types"]["llava"], "status": "unverified", "reason": "broken"}
    changed = {**table, "types": {**table["types"], "llava": row}}
    assert list(worse(changed)) == ["llava"]


def test_every_exact_type_shows_or_refuses_reducers_that_read_attention() -> None:
    for name, row in load(NEWEST)["types"].items():
        if row["status"] == "exact":
            assert {*SCORED} <= {*row["errors"], *row.get("refusals", {})}, name
            assert all(row["errors"].get(r, 0) <= TOLERANCE for r in SCORED), name
