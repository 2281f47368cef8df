"""The imports of the package point downwards, and no two modules import each other.

Imports are read from the source: those inside functions and under TYPE_CHECKING count as well. A
module that needs another one only for its types still cannot be understood, or changed, without
it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {
    "tokencomp": REPOSITORY / "tokencomp",
    "tokencomp.kernels": REPOSITORY / "kernels",
    "tokencomp.zoo.shapesqa": REPOSITORY / "zoo" / "tokencomp_zoo" / "shapesqa",
}
# From the top down; a module may import from its own room and from those below it. The package
# itself (`import tokencomp`) offers the public names, the highest of which is `Session`.
ROOMS = (
    ("__main__", "cli"),
    ("serving", "training", "evaluation", "lmms", "mlx", "pages", "zoo"),
    ("tokencomp", "session"),
    ("inputs", "models"),
    ("patching", "handle", "method", "speed", "conformance"),
    ("engine", "context_window"),
    ("adapters", "trained", "reducers"),
    ("plan", "tokens"),
    ("torchlib",),
    ("validation", "errors", "storage"),
    ("kernels",),
)
Edge = tuple[str, str]


@cache
def modules() -> dict[str, ast.Module]:
    result = {}
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            dotted = ".".join([name, *(p for p in parts if p != "__init__")])
            result[dotted] = ast.parse(path.read_text(encoding="utf-8"))
    return result


def imported(tree: ast.Module, known: Collection[str]) -> set[str]:
    """Names of the modules that a module imports; `from a import b` is "a.b" if that is a module.

    Parameters
    ----------
    known
        Names of the modules that exist.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in known else node.module)
    return names


@cache
def imports() -> dict[str, set[str]]:
    return {name: imported(tree, modules()) for name, tree in modules().items()}


def edges() -> set[Edge]:
    """(importing module, imported module), both of the package."""
    return {(a, b) for a, names in imports().items() for b in names if b in modules() and a != b}


def rank(module: str) -> int:
    """Number of the room, 0 at the top."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else parts[0]
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


def upward() -> set[Edge]:
    return {(a, b) for a, b in edges() if rank(b) < rank(a)}


def reachable(start: str, graph: set[Edge]) -> set[str]:
    """Modules that `start` imports, directly or through others."""
    seen: set[str] = set()
    stack = [start]
    while stack:
        current = stack.pop()
        following = {b for a, b in graph if a == current} - seen
        seen |= following
        stack += following
    return seen


def on_cycles(graph: set[Edge]) -> set[Edge]:
    below = {module: reachable(module, graph) for module in {a for a, _ in graph}}
    return {(a, b) for a, b in graph if a in below.get(b, set())}


def test_every_module_has_a_room() -> None:
    rooms = {room for row in ROOMS for room in row}
    tops = {(name.split(".")[1:] or ["tokencomp"])[0] for name in modules()}
    assert tops <= rooms, f"give {sorted(tops - rooms)} a place in ROOMS"


def test_no_two_modules_import_each_other() -> None:
    assert not on_cycles(edges())


def test_imports_point_downwards() -> None:
    assert not upward()


@pytest.mark.parametrize(
    ("room", "banned"),
    [
        ("tokencomp.kernels", {"transformers"}),
        ("tokencomp.reducers", {"transformers", "tokencomp.adapters", "tokencomp.engine"}),
    ],
)
def test_rooms_without_models(room: str, banned: set[str]) -> None:
    """Reducers and kernels see tensors and grids, never Hugging Face objects."""
    for name, names in imports().items():
        if f"{name}.".startswith(f"{room}."):
            wrong = {n for n in names for b in banned if f"{n}.".startswith(f"{b}.")}
            assert not wrong, f"{name} imports {sorted(wrong)}"


def test_kernels_import_nothing_of_the_package() -> None:
    inside = "tokencomp.kernels"
    assert {b for a, b in edges() if a.startswith(inside) and not b.startswith(inside)} == set()


def test_the_package_stands_without_the_folders_beside_it() -> None:
    """A wheel has none of them."""
    beside = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tokencomp"}
    assert {"recipes", "benchmarks"} <= beside
    wrong = {(a, b) for a, names in imports().items() for b in names if b.split(".")[0] in beside}
    assert not wrong


def test_import_loads_the_standard_library_only() -> None:
    """So `import tokencomp` is fast: torch, transformers and the rest come with the first use."""
    code = """
import sys
before = set(sys.modules)
import tokencomp
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - {"tokencomp"} - sys.stdlib_module_names))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_mlx_needs_no_torch() -> None:
    """What `tokencomp.mlx` imports at once of the package, where torch cannot be imported."""
    own = [tree for name, tree in modules().items() if name.startswith("tokencomp.mlx.")]
    at_once = ast.Module(
        [n for tree in own for n in tree.body if isinstance(n, ast.ImportFrom)], []
    )
    names = {n for n in imported(at_once, modules()) if n.startswith("tokencomp.")}
    needed = sorted(n for n in names if not n.startswith("tokencomp.mlx"))
    assert "tokencomp.errors" in needed
    code = f"import sys; sys.modules['torch'] = None\nimport {', '.join(needed)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
