"""What mkdocs.yml cannot say: where pages lie, and which methods there are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "<!-- methods -->"


def on_config(config: Any) -> Any:
    """Take pages from the root of the repository, which the file itself may not name."""
    config.docs_dir = str(ROOT)
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the docstrings of all methods into the page that has the mark."""
    if MARK not in markdown:
        return markdown
    parts = [
        f"### `{name}`\n\n::: {path}\n    options:\n      members: false\n"
        "      show_root_heading: false\n      show_bases: false\n"
        for name, path in sorted(methods())
    ]
    return markdown.replace(MARK, "\n".join(parts))


def methods() -> Iterator[tuple[str, str]]:
    """Name and class of every registered reducer, read from the source."""
    for file in (ROOT / "tokencomp" / "reducers").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "register_reducer":
                    name = ast.literal_eval(call.args[0])
                    yield name, f"tokencomp.reducers.{file.stem}.{node.name}"
