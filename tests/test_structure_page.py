"""`docs/structure.md` says where things are: what it names exists, and every room has a line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "tokencomp"
PAGE = (REPOSITORY / "docs" / "structure.md").read_text(encoding="utf-8")
# `Class.method` (`file`), `one` and `two` (`file`), or (`function`, `file`).
BEFORE = re.compile(r"((?:`[\w.]+`(?: and )?)+)\s+\(`([\w/]+\.py)`\)")
INSIDE = re.compile(r"\((`[\w.]+`),\s+`([\w/]+\.py)`\)")


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file: "f", "C" and "C.f"."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            names |= {f"{node.name}.{n.name}" for n in methods}
    return names


def test_what_the_steps_name_exists() -> None:
    """Paths begin in engine/, or in the package itself."""
    found = [*BEFORE.findall(PAGE), *INSIDE.findall(PAGE)]
    assert len(found) >= 15  # ten steps, some of which name several functions
    for names, file in found:
        path = next(p for p in (PACKAGE / "engine" / file, PACKAGE / file) if p.exists())
        known = defined(path)
        for name in re.findall(r"[\w.]+", names.replace(" and ", " ")):
            last = {full.split(".")[-1] for full in known}
            assert name in known or name in last, f"{file} has no {name}"


def test_every_room_has_a_line() -> None:
    parts = PAGE.split("A fact, its unit", 1)
    rest = parts[1].split("## Other rooms", 1)[1]
    lines = [x.split("|")[1] for x in (parts[0] + rest).splitlines() if x.startswith("| `")]
    named = {name.strip("/") for line in lines for name in re.findall(r"`([\w/.]+)`", line)}
    rooms = {path.parent.name for path in (PACKAGE / "engine").glob("*/__init__.py")}
    rooms |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"engine"}
    files = {path.name for path in (*PACKAGE.glob("*.py"), *(PACKAGE / "engine").glob("*.py"))}
    assert rooms | files - {"__init__.py"} == named
