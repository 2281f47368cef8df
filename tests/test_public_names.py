"""A public name of the last release that changes or goes has a line in the changelog."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import public


def released() -> list[Path]:
    """The interface of the newest release; none before the first one."""
    files = public.FOLDER.glob("*.json")
    return sorted(files, key=lambda path: tuple(map(int, path.stem.split("."))))[-1:]


def newer_sections(version: str) -> str:
    """The text of the changelog above the section of a release."""
    text = (public.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    head, found, _ = text.partition(f"\n## {version} ")
    assert found, f"CHANGELOG.md has no section for {version}"
    return head


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Public names that went, or whose signature differs."""
    return [name for name, text in before.items() if now.get(name) != text]


@pytest.mark.parametrize("path", released(), ids=lambda path: path.stem)
def test_what_changed_since_the_release_is_in_the_changelog(path: Path) -> None:
    text = newer_sections(path.stem)
    names = changed(json.loads(path.read_text(encoding="utf-8")), public.interface())
    missing = [
        n for n in names if not re.search(rf"(?<!\w){re.escape(re.split('[. ]', n)[-1])}\b", text)
    ]
    assert not missing, (
        f"public names changed since {path.stem} without a line in CHANGELOG.md: {missing}. "
        "Name them there, and keep the old form for one minor release (docs/support.md)."
    )


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"a.f": "(x)"}, {"a.f": "(x)"}, []),
        ({"a.f": "(x)"}, {"a.f": "(x, y=1)"}, ["a.f"]),
        ({"tokencomp serve --budget": "option"}, {}, ["tokencomp serve --budget"]),
        ({}, {"a.g": "()"}, []),
    ],
)
def test_changes_are_found(
    before: dict[str, str], now: dict[str, str], expected: list[str]
) -> None:
    assert changed(before, now) == expected


def test_the_interface_has_every_part() -> None:
    """Names that the documentation uses; a reader that found none would pass every change."""
    names = public.interface()
    assert names["tokencomp.patching.patch"].startswith("(model")
    assert names["tokencomp.tokens.tokens.Kept.patches"] == "field"
    for name in (
        "tokencomp.errors.PlanError", "tokencomp serve --budget", "request.tokencomp.ratio",
        "request.messages", "plan.by_modality", "metric.tokencomp_load_step",
    ):  # fmt: skip
        assert name in names, name
