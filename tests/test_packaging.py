"""What the wheels hold, what they need, and what is said when an optional package is missing."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.console import run

import tokencomp
from tokencomp.cli import one_message
from tokencomp.errors import EXTRAS, INSTALL, MissingDependencyError, install
from tokencomp.inputs import packaged
from tokencomp.inputs.media import load_media
from tokencomp.training.data import questions

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "zoo" / "tokencomp_zoo"
TOML = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
IMPORTED = {"pillow": "PIL"}  # distributions whose module has another name


def project(folder: Path = ROOT) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((folder / "pyproject.toml").read_text())


def modules_of(requirements: list[str]) -> set[str]:
    """Names under which the packages of a list of requirements are imported."""
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}
    return {IMPORTED.get(name, name.replace("-", "_")) for name in names}


@TOML
def test_every_package_is_listed() -> None:
    listed = project()["tool"]["setuptools"]["packages"]
    found = set()
    for folder, name in (
        (ROOT / "tokencomp", "tokencomp"),
        (ROOT / "kernels", "tokencomp.kernels"),
    ):
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            found.add(".".join((name, *parts)))
    assert set(listed) == found


@TOML
def test_one_version_stands_everywhere() -> None:
    """In both distributions, the module, the citation, and the newest dated section."""
    versions = {project(folder)["project"]["version"] for folder in (ROOT, ROOT / "zoo")}
    versions.add(tokencomp.__version__)
    for file, line in (("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## (\S+) \(\d")):
        found = re.search(line, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None
        versions.add(found[1])
    assert len(versions) == 1


def test_the_index_gets_a_readme_without_relative_links(tmp_path: Path) -> None:
    """The commands of the workflow, run here on a copy."""
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    commands = re.findall(r"^ +((?:at=|sed ).*)$", workflow, re.MULTILINE)
    shutil.copy(ROOT / "README.md", tmp_path)
    env = {"GITHUB_SERVER_URL": "https://host", "GITHUB_REPOSITORY": "own/er"}
    env |= {**os.environ, "GITHUB_REF_NAME": "v1.2.3"}
    subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=tmp_path, env=env, check=True)
    text = (tmp_path / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 30 and all(re.match("https?://", link) for link in links)
    for kind in ("](https://host/own/er/raw/v1.2.3/docs/kept.png)", "/blob/v1.2.3/docs/usage.md)"):
        assert kind in text


# -- what it needs ------------------------------------------------------------------------------


@TOML
def test_every_import_is_a_dependency() -> None:
    """Of the core, or of an extra; `EXTRAS` knows the extra of what commands and media need."""
    described = project()["project"]
    extras = described["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert module in modules_of(extras[extra]) | {"markupsafe"}, module  # jinja2 brings it
    known = modules_of(described["dependencies"]) | set(EXTRAS) | {"tokencomp", "tokencomp_zoo"}
    known |= modules_of([r for requirements in extras.values() for r in requirements])
    for part in ("tokencomp", "kernels"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
                beyond = tops - known - THEIRS - OTHER_DECODERS
                assert not beyond, f"{path} imports {sorted(beyond)}"


THEIRS = {"sglang", "huggingface_hub", "packaging", "starlette", "anyio", "h11", "loguru"}
THEIRS |= {"pydantic_core", "typing_extensions"}  # of pydantic
THEIRS |= {"cachetools", "yaml"}  # of vLLM, and yaml of transformers
"""What other packages bring that these modules run in or import first."""
OTHER_DECODERS = {"torchcodec"}
"""Which users install by themselves."""


@TOML
def test_patch_runs_with_the_core_alone() -> None:
    """One prompt of an image, as tensors, in a process that lacks all of `EXTRAS`."""
    dependencies = modules_of(project()["project"]["dependencies"])
    assert dependencies == {"torch", "transformers", "safetensors", "numpy"}
    brought = {"tqdm", "jinja2", "markupsafe", "typer", "rich"}  # by torch and transformers
    code = f"""
import sys
for name in {sorted(set(EXTRAS) - brought)}:
    sys.modules[name] = None
import torch, tokencomp
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(ZOO / "models" / "tiny-qwen2-vl")!r})
vision, config = model.config.vision_config, model.config
pixels = torch.randn(64, 3 * vision.temporal_patch_size * vision.patch_size**2)
ids = [config.vision_start_token_id, *[config.image_token_id] * 16, config.vision_end_token_id, 5]
ids = torch.tensor([ids])
kinds = (ids == config.image_token_id).int()
inputs = dict(input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 8, 8]]))
with tokencomp.patch(model, ratio=0.75) as handle:
    model.generate(**inputs, mm_token_type_ids=kinds, max_new_tokens=2)
    print(handle.stats)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("16 → 4 visual tokens"), done.stderr


@pytest.mark.parametrize("name", EXTRAS)
def test_a_package_that_a_command_lacks(name: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit), one_message():
        importlib.import_module(f"{name}.part")
    said = f"this needs {name}, which is not installed: {install(EXTRAS[name])}."
    assert said in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), one_message():  # nothing to advise
        importlib.import_module("no_such_package")


def test_media_name_their_extra(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install("media"))):
        load_media(ZOO / "samples" / "test-needle-00001.mp4")
    code = "import sys; sys.modules['PIL'] = None; import tokencomp.inputs.media"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert install("media") in done.stderr.splitlines()[-1]


# -- the embedded models --------------------------------------------------------------------------


@TOML
def test_model_folders_are_package_data_and_small() -> None:
    """The globs reach every file, also in the nested folders of VILA, and all stay below 55 MB."""
    tool = project(ROOT / "zoo")["tool"]["setuptools"]
    shipped = {p for glob in tool["package-data"]["tokencomp_zoo"] for p in ZOO.glob(glob)}
    kept = {path for part in ("models", "samples") for path in (ZOO / part).rglob("*")}
    assert {path for path in kept if path.is_file()} <= shipped
    assert 5e6 < sum(path.stat().st_size for path in shipped if path.is_file()) <= 55e6
    for folder in (ROOT, ROOT / "zoo"):  # else pip warns that folders are no packages
        assert project(folder)["tool"]["setuptools"]["include-package-data"] is False
    assert (ROOT / "zoo" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_without_the_zoo_its_models_say_how_to_install_it(
    monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(packaged, "CHECKOUT", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "tokencomp_zoo", None)
    assert packaged.available_models() == []
    assert packaged.resolve("some/model") == "some/model"
    for call in (packaged.resolve, packaged.model_path):
        with pytest.raises(MissingDependencyError, match=re.escape(INSTALL["zoo"])):
            call("tiny-qwen2-vl")
    for module in [m for m in sys.modules if f"{m}.".startswith("tokencomp.zoo.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(tokencomp, "zoo", raising=False)
    with pytest.raises(MissingDependencyError, match=re.escape(INSTALL["zoo"])):
        questions("shapesqa", "image", 2)
    assert run("demo", "-o", tmp_path / "demo.html") == 2
    assert INSTALL["zoo"] in capsys.readouterr().err


# -- wheels ---------------------------------------------------------------------------------------

USE = """
import importlib.util, json
import tokencomp
from tokencomp import zoo
from tokencomp.inputs.media import load_media
from tokencomp.inputs.prompts import build_inputs, generate

assert not any(map(importlib.util.find_spec, ("recipes", "benchmarks")))
from tokencomp.zoo.shapesqa.items import item

assert item("test", "attribute", 0).image().size
model, processor = zoo.load()
row = json.loads((zoo.SAMPLES / "questions.json").read_text())[0]
inputs = build_inputs(processor, [[load_media(zoo.SAMPLES / row["media"])]], [row["question"]])
with tokencomp.patch(model, ratio=0.5):
    (answer,) = generate(model, processor, inputs, 8)
print(json.dumps([tokencomp.__file__, str(zoo.SAMPLES), answer == row["answer"]]))
"""


@pytest.mark.long
def test_two_wheels_answer_a_sample(tmp_path: Path) -> None:
    """Built from the committed files, unpacked, and used where no checkout can be imported."""
    source, site = tmp_path / "source", tmp_path / "site"
    copy = ["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={source}/"]
    subprocess.run(copy, check=True)
    for folder in (source, source / "zoo"):
        build = f"from setuptools.build_meta import build_wheel as b; print(b({str(tmp_path)!r}))"
        command = [sys.executable, "-c", build]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    library, models = sorted(tmp_path.glob("*.whl"))
    assert library.stat().st_size < 2e6 < models.stat().st_size
    for wheel in (library, models):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    tops = {path.name.partition("-")[0] for path in site.iterdir()}
    assert tops == {"tokencomp", "tokencomp_zoo"}
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", USE]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    *places, right = json.loads(out.stdout.splitlines()[-1])
    assert all(Path(place).is_relative_to(site) for place in places) and right


# -- folders of the checkout and installed distributions ------------------------------------------


@pytest.mark.parametrize("folder", [".", "tests"])
def test_the_root_does_not_shadow_the_distribution_kernels(folder: str, tmp_path: Path) -> None:
    """transformers needs it from 5.25 on, in programs that start in the root as well."""
    (tmp_path / "kernels.py").write_text("")
    code = "import tokencomp.kernels, kernels; print(kernels.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(
        command, cwd=ROOT / folder, env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str(tmp_path / "kernels.py")


def test_no_package_of_the_root_has_the_name_of_a_distribution() -> None:
    """A folder with an `__init__.py` comes first in programs that start in the root."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tokencomp"}
    assert packages and packages.isdisjoint(importlib.metadata.packages_distributions())
