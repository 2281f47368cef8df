"""The site: every page is built without a warning, and its links lead to files of the site."""

from __future__ import annotations

import html
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokencomp.reducers.registry import available_reducers

ROOT = Path(__file__).parents[1]


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_method() -> None:
    ours = {
        name: f"{cls.__module__}.{cls.__qualname__}"
        for name, cls in available_reducers().items()
        if cls.__module__.startswith("tokencomp.")
    }
    assert ours and dict(hooks().methods()) == ours
    page = hooks().on_page_markdown((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert all(f"::: {path}\n" in page for path in ours.values())


def missing(page: Path) -> list[str]:
    """Links of a built page, and files that it loads, that are not beside it."""
    found = []
    for link in re.findall(r'(?:href|src)="?([^"\s>]+)', page.read_text(encoding="utf-8")):
        target = page.parent / html.unescape(link).partition("#")[0].partition("?")[0]
        away = re.match(r"[a-z]+:|//|#", link)
        if not away and not target.is_file() and not (target / "index.html").is_file():
            found.append(link)
    return found


@pytest.mark.long
def test_the_site_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [page for page in tmp_path.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 40 and (tmp_path / "search" / "search_index.json").exists()
    assert {str(page): bad for page in pages if (bad := missing(page))} == {}
    reference = (tmp_path / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("tokencomp.patching.patch", "tokencomp.handle.Handle.set", "condiv"):
        assert f'id="{name}"' in reference
