"""What the wheel holds: every package, all data files, and nothing that only a checkout needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
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


def test_the_zoo_is_models_samples_and_what_loads_them() -> None:
    """What trains the models stands in `recipes/`."""
    zoo = ROOT / "tokencomp" / "zoo"
    assert [path.relative_to(zoo).as_posix() for path in zoo.rglob("*.py")] == ["__init__.py"]
    weights = {path.stem for path in zoo.rglob("*.safetensors")}
    assert weights == {"model", "ccam", "selector"}
    asked = {row["media"] for row in json.loads((zoo / "samples" / "questions.json").read_text())}
    assert {path.name for path in (zoo / "samples").iterdir()} == {*asked, "questions.json"}


USE = """
import importlib.util, json
import tokencomp
from tokencomp import zoo
from tokencomp.inputs.media import load_media
from tokencomp.inputs.prompts import build_inputs, generate

assert not any(map(importlib.util.find_spec, ("recipes", "benchmarks")))
model, processor = zoo.load()
row = json.loads((zoo.SAMPLES / "questions.json").read_text())[0]
inputs = build_inputs(processor, [[load_media(zoo.SAMPLES / row["media"])]], [row["question"]])
with tokencomp.patch(model, ratio=0.5):
    (answer,) = generate(model, processor, inputs, 8)
print(json.dumps([tokencomp.__file__, answer == row["answer"]]))
"""


@pytest.mark.long
def test_a_wheel_alone_answers_a_sample(tmp_path: Path) -> None:
    """Built from the committed files, unpacked, and used where no checkout can be imported."""
    source, site = tmp_path / "source", tmp_path / "site"
    copy = ["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={source}/"]
    subprocess.run(copy, check=True)
    build = f"from setuptools.build_meta import build_wheel as b; print(b({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    tops = {path.name.partition("-")[0] for path in site.iterdir()}
    assert tops == {"tokencomp"}
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", USE]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    place, right = json.loads(out.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(site) and right
