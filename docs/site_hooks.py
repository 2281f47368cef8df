"""What mkdocs.yml cannot say: where pages lie, which methods there are, links of notebooks."""

from __future__ import annotations

import ast
import posixpath
import re
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


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Let links of notebooks to pages lead to the built pages; mkdocs does so for Markdown."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def led(link: re.Match[str]) -> str:
        path = posixpath.join(posixpath.dirname(page.file.src_uri), link[1])
        file = files.get_file_from_path(posixpath.normpath(path))
        return link[0] if file is None else f'href="{file.url_relative_to(page.file)}"'

    return re.sub(r'href="([^":#]+\.(?:md|ipynb))"', led, html)


def methods() -> Iterator[tuple[str, str]]:
    """Name and class of every registered reducer, read from the source."""
    for file in (ROOT / "tokencomp" / "reducers").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "register_reducer":
                    name = ast.literal_eval(call.args[0])
                    yield name, f"tokencomp.reducers.{file.stem}.{node.name}"
