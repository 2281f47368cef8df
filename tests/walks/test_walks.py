"""First days of strangers: what README and docs tell them to type, typed in an empty folder.

Commands and code are taken from the pages, so that a page that changes is walked as it says then.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.serving import http as servers

from tokencomp.zoo import SAMPLES

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
MODEL = "tiny-qwen2-vl"


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page: str, start: str) -> list[list[str]]:
    """Commands in the blocks of a page, or after `&&`, that begin so, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    found = [shlex.split(part, comments=True) for part in parts if part.startswith(start)]
    assert found, f"{page} has no {start!r}"
    return found


class Desk:
    """An empty folder in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}

    def run(self, *args: str, fails: int = 0) -> str:
        """Output of `tokencomp ARGS`, which ends with the code `fails`."""
        return self.python("-m", "tokencomp", *args, fails=fails)

    def python(self, *args: str, fails: int = 0) -> str:
        command = [sys.executable, *args]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == fails, f"{args}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if fails else "")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """With a picture and a clip of one's own."""
    image = Image.open(SAMPLES / "test-position-00003.jpg")
    for name in ("street.jpg", "a.png", "b.png", "image.png", "table.jpg"):
        image.save(tmp_path / name)
    for name in ("kitchen.mp4", "clip.mp4"):
        shutil.copy(SAMPLES / "test-needle-00001.mp4", tmp_path / name)
    return Desk(tmp_path)


def test_a_visitor_looks_at_the_demo_and_at_her_own_files(desk: Desk) -> None:
    (demo,) = commands("README.md", "tokencomp demo")
    assert "Pictures of what was kept: " in desk.run(*demo[1:])
    assert (desk.folder / "tokencomp-demo.html").exists()
    own = ("--model", MODEL, "--image", "street.jpg", "--question", "What color is the circle?")
    assert "orange" in desk.run("inspect", *own)
    clip = ("--model", MODEL, "--video", "clip.mp4", "--question", "What color is the diamond?")
    assert "purple" in desk.run("inspect", *clip, "--reducer", "kcenter", "--ratio", "0.5")
    refused = desk.run("inspect", "--model", "./street.jpg", "--image", "street.jpg", fails=2)
    assert "no such folder. Give one" in refused
    Image.new("1", (14_000, 14_000)).save(desk.folder / "huge.png")
    refused = desk.run("inspect", "--model", MODEL, "--image", "huge.png", fails=2)
    assert "too large" in refused and "Traceback" not in refused
    (script,) = [code for code in blocks("README.md", "python") if "zoo.load()" in code]
    assert "64 → 16 visual tokens" in desk.python("-c", script)


def test_a_researcher_asks_her_own_questions(desk: Desk) -> None:
    (file,) = [block for block in blocks("docs/evaluation.md", "") if '"question"' in block]
    (desk.folder / "questions.jsonl").write_text(file, encoding="utf-8")
    (evaluate,) = commands("docs/evaluation.md", "tokencomp eval --model")
    (report,) = commands("docs/evaluation.md", "tokencomp report")
    table = desk.run(*[MODEL if part == "MODEL" else part for part in evaluate[1:]])
    assert "condiv" in table and "downscale" in table
    desk.run(*report[1:], "--table", "results.csv", "--table", "results.tex")
    assert (desk.folder / "results.tex").read_text().startswith("\\begin{tabular}")
    rows = (desk.folder / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 2 * (2 + 3)  # head, full, and per ratio methods and baselines
    wrong = desk.run("eval", "--model", MODEL, "--data", "none.jsonl", "-o", "other", fails=2)
    assert "none.jsonl" in wrong and not (desk.folder / "other").exists()


def test_an_operator_serves_and_an_agent_asks(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (serve,) = [c for c in commands("docs/serving.md", "tokencomp serve --model") if MODEL in c]
    (curl,) = [block for block in blocks("docs/serving.md", "bash") if "curl -s" in block]
    client = next(block for block in blocks("docs/serving.md", "python") if "OpenAI(" in block)
    monkeypatch.chdir(desk.folder)
    with servers.server(tmp_path / "log", *serve[2:]) as url:
        here = lambda text: text.replace("http://127.0.0.1:8000", url)  # noqa: E731
        if shutil.which("curl"):
            done = subprocess.run(["bash", "-c", here(curl)], capture_output=True, text=True)
            answer = json.loads(done.stdout)
            assert "orange" in answer["choices"][0]["message"]["content"], done
        tools = [{"type": "function", "function": {"name": "click"}}]
        asked = {"messages": [{"role": "user", "content": "Click."}], "tools": tools}
        status, refusal = servers.get(f"{url}/v1/chat/completions", asked)
        assert status == 400 and "response_format" in refusal  # what this model can do instead
        pytest.importorskip("openai")
        assert "orange" in desk.python("-c", here(client))
        example = ROOT / "examples" / "serve_client.py"
        asked = desk.python(
            str(example), "image.png", "What color is the circle?", "--url", f"{url}/v1"
        )
        assert len(asked.splitlines()) == 3 and "orange" in asked


def test_an_author_brings_a_method_in_a_package(desk: Desk) -> None:
    (entry,) = [b for b in blocks("docs/methods.md", "toml") if "tokencomp.reducers" in b]
    name, module = re.findall(r'^(\w+) = "([\w.]+)"', entry, re.MULTILINE)[0]
    source = (ROOT / "examples" / "custom_reducer.py").read_text(encoding="utf-8")
    method = source.partition("\nmodel, processor = ")[0].replace('"loudest"', f'"{name}"')
    path = desk.folder.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir()
    path.write_text(method, encoding="utf-8")
    info = desk.folder / "my_package-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[tokencomp.reducers]\n{name} = {module}\n")
    assert re.search(rf"^{name} ", desk.run("list", "reducers"), re.MULTILINE)
    own = ("--model", MODEL, "--image", "street.jpg", "--question", "What color is the circle?")
    assert name in desk.run("inspect", *own, "--reducer", name)
