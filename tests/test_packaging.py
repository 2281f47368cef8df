"""What pyproject.toml puts into the wheel: every package, and all data files but no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_every_package_is_listed() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for folder, name in (
        (ROOT / "tokencomp", "tokencomp"),
        (ROOT / "kernels", "tokencomp.kernels"),
    ):
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            found.add(".".join((name, *parts)))
    assert set(listed) == found


def test_a_checkout_in_the_working_directory_has_its_kernels() -> None:
    """`python -m` imports from there even if tokencomp is installed elsewhere."""
    code = (
        "import sys, importlib.util\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "print(importlib.util.find_spec('tokencomp.kernels').origin)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(process.stdout.strip()) == ROOT / "kernels" / "__init__.py"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_model_folders_are_package_data_and_small() -> None:
    """The globs reach every file, also in the nested folders of VILA, and all stay below 25 MB."""
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped: set[Path] = set()
    for package, globs in tool["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        shipped |= {path for glob in globs for path in folder.glob(glob) if path.is_file()}
    zoo = ROOT / "tokencomp" / "zoo"
    kept = {path for part in ("models", "samples") for path in (zoo / part).rglob("*")}
    assert {path for path in kept if path.is_file()} <= shipped
    assert tool["include-package-data"] is False  # else pip warns that folders are no packages
    assert 5e6 < sum(path.stat().st_size for path in shipped) <= 40e6
