"""docs/coming-from.md: every plan and command runs, and keeps what the named method keeps."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import matrix
from support.console import run
from support.families import FAMILIES, text
from support.merge_loops import Row, merge_group

import tokencomp
from tokencomp.inputs.prompts import build_inputs, prompt_lengths
from tokencomp.serving import launch
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.zoo import SAMPLES
from tokencomp.zoo import load as load_embedded

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text(encoding="utf-8")
PICTURE = SAMPLES / "test-position-00003.jpg"


def section(title: str) -> str:
    return re.split(r"^##+ ", PAGE.split(f"# {title}\n")[1], flags=re.MULTILINE)[0]


def blocks(title: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)
    return found


def commands(text: str) -> list[list[str]]:
    """Arguments of the lines and code spans that call tokencomp."""
    lines = re.findall(r"(?:^|`)tokencomp ((?:eval|report|serve) [^`\n]*)", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.fixture
def prompt() -> dict[str, Any]:
    """A patched model's names on the page: `model` with eager attention, and `inputs`."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build("eager"), family.batch([[text(3), family.image(0), text(6, 3)]])
    return {"tokencomp": tokencomp, "model": model, "inputs": inputs}


def kept(prompt: dict[str, Any]) -> list[int]:
    """Offsets in the image that the patch in force keeps after its last stage."""
    with torch.no_grad():
        prompt["model"](**prompt["inputs"])
    (after,) = prompt["handle"].stats.kept(0)[-1]
    return after


def test_every_block_of_the_page_is_run_here() -> None:
    named = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    code = [title for title in named for _ in re.findall("```", section(title))]
    tested = {"Limits of image tokens", "EVS in vLLM", "FastV", "VisionZip", "ToMe"}
    assert {*code} == tested | {"AngelSlim and LightCompress"}


def test_fastv_as_a_ratio_and_as_a_plan(prompt: dict[str, Any]) -> None:
    """The best image tokens by the last row of an eager map, mean over heads, after layer 2."""
    with torch.no_grad():
        maps = prompt["model"](**prompt["inputs"], output_attentions=True).attentions
    (span,) = spans(prompt)

    def best(layer: int, fraction: float) -> list[int]:
        scores = maps[layer - 1][0].mean(0)[-1, span.start : span.stop].tolist()
        ranked = sorted(range(span.length), key=lambda i: (-scores[i], i))
        return sorted(ranked[: int(span.length * fraction + 0.5)])

    by_ratio, by_plan = blocks("FastV", "python")
    exec(by_plan, prompt)
    half = best(2, 0.5)
    assert kept(prompt) == half and "plan (fastv before layer 2)" in repr(prompt["handle"])
    prompt["handle"].set(plan=[{"layer": 2, "fraction": 0.5, "reducer": "prune"}])
    assert kept(prompt) != half  # AIM's PageRank
    exec(by_ratio.replace("max_new_tokens=64", "max_new_tokens=2"), prompt)
    prompt["handle"] = tokencomp.patch(prompt["model"], ratio=0.5, reducer="fastv")
    (stage,) = prompt["handle"].plan.stages
    assert kept(prompt) == best(stage.layer, stage.fraction)
    (cut,) = tokencomp.make_reducer("fastv").plan(0.5, 28).stages
    assert cut.layer == 2 and f"keeps {cut.fraction:.0%}".replace("%", " %") in PAGE


def spans(prompt: dict[str, Any]) -> list[Any]:
    with tokencomp.patch(prompt["model"], 0.1, reducer="uniform") as handle, torch.no_grad():
        prompt["model"](**prompt["inputs"])
        return list(handle.stats.spans[0])


def test_visionzip_keeps_54_dominant_and_10_contextual_tokens(prompt: dict[str, Any]) -> None:
    """Of LLaVA's 576 at the count of the release: the 54 of largest attention are among 64."""
    (code,) = blocks("VisionZip", "python")
    exec("handle = " + code, prompt)
    (stage,) = prompt["handle"].plan.stages
    given = matrix.tokens((1, 24, 24))
    rows = matrix.kept(stage.reducer, given, 64).patches.tolist()
    attention = given.tower[TOWER_ATTENTION].tolist()
    dominant = sorted(range(576), key=lambda i: (-attention[i], i))[:54]
    assert {*dominant} < {*rows} and len(rows) - len(dominant) == 10
    others = [i for i in range(576) if i not in dominant]
    step = len(others) // 10
    assert {*rows} - {*dominant} == {others[i * step] for i in range(10)}


def test_tome_is_the_default_on_images_or_pairs_of_similar_tokens(prompt: dict[str, Any]) -> None:
    (code,) = blocks("ToMe", "python")
    exec("handle = " + code, prompt)
    named, merges = kept(prompt), prompt["handle"].plan.stages[0].merge
    prompt["handle"] = tokencomp.patch(prompt["model"], ratio=0.5)
    assert kept(prompt) == named and merges is True
    assert prompt["handle"].plan.stages[0].merges("image", 0.5)
    assert 'or `reducer="bipartite"`' in PAGE
    x = matrix.tokens((1, 6, 6))
    rows = [Row(i, 1.0, value) for i, value in enumerate(x.features.double().tolist())]
    pairs = [row.place for row in merge_group(rows, 18)]
    bipartite = tokencomp.make_reducer("bipartite")
    assert matrix.kept(bipartite, x, 18).patches.tolist() == pairs


def noise(frames: int, side: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8))
        for _ in range(frames)
    ]


def test_a_budget_caps_every_image_and_the_whole_clip() -> None:
    """512 of a larger image; 16 for each of 32 frames of a clip, whose tokens two frames share."""
    model, processor = load_embedded("tiny-qwen2-vl")
    processor.image_processor.size["longest_edge"] = 640 * 28 * 28
    (code,) = blocks("Limits of image tokens", "python")
    image, clip = noise(1, 720)[0], noise(32, 336)
    for one in (image, clip):
        inputs = build_inputs(processor, [[one]], ["What is this?"])
        known = {"tokencomp": tokencomp, "model": model, "inputs": inputs}
        exec(code.replace("max_new_tokens=64", "max_new_tokens=1"), known)
        stats = known["handle"].stats
        ((_, before),) = prompt_lengths(model, inputs)
        assert before > 512 and {*stats.tokens_after[0]} == {512}
    assert 512 / len(clip) == 16 and "leaves 16 tokens for each of 32 frames" in PAGE
    assert len(kept_frames := stats.kept(0)[-1][0]) == 512 and max(kept_frames) > before // 2
    processor.video_processor.size["longest_edge"] = 512 * 28 * 28
    inputs = build_inputs(processor, [[noise(32, 700)]], ["What is this?"])
    assert inputs["video_grid_thw"].tolist()[0][0] == 16
    assert 0.9 * 8192 < prompt_lengths(model, inputs)[0][1] <= 8192 and "8,192" in PAGE


def test_max_pixels_counts_frames_in_qwen2_and_clips_in_qwen3() -> None:
    found = {}
    for name in ("tiny-qwen2-vl", "tiny-qwen3-vl"):
        model, processor = load_embedded(name)
        processor.video_processor.size["longest_edge"] = 4 * 64 * 28 * 28
        for frames in (8, 32):
            inputs = build_inputs(processor, [[noise(frames, 560)]], ["?"])
            found[name, frames] = prompt_lengths(model, inputs)[0][1]
    assert found["tiny-qwen2-vl", 32] == 4 * found["tiny-qwen2-vl", 8]
    assert found["tiny-qwen3-vl", 32] <= 1.1 * found["tiny-qwen3-vl", 8]


def test_commands_of_servers_reach_their_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def noted(*args: Any) -> tuple[list[str], dict[str, str]]:
        called.append(args)
        return [], {}

    monkeypatch.setattr(launch, "vllm_command", noted)
    monkeypatch.setattr(launch, "run_vllm", lambda *args: None)
    monkeypatch.setattr(launch, "run_hf", lambda *args, **more: called.append((*args, more)))
    lines = [line for line in commands(PAGE) if line[0] == "serve"]
    assert len(lines) == 3
    for line in lines:
        assert run(*line) == 0
    settings = [call[1] for call in called]
    assert [(s.get("reducer"), s.get("ratio"), s.get("budget")) for s in settings] == [
        ("evs", {"video": 0.5}, None), ("auto", None, 512), ("evs", {"video": 0.5}, None),
    ]  # fmt: skip
    assert called[1][0] == "NAME" and called[1][-1]["image_max_tokens"] == 3072


def test_commands_of_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an embedded model: one table of methods and baselines at equal visual-token work."""
    monkeypatch.chdir(tmp_path)
    picture = {"media": str(PICTURE), "answer": "above", "question": "Above or below?"}
    Path("questions.jsonl").write_text(json.dumps(picture) + "\n", encoding="utf-8")
    evaluated, report = commands(section("AngelSlim and LightCompress"))
    at = evaluated.index("--model") + 1
    assert run(*evaluated[:at], "tiny-qwen3-vl", *evaluated[at + 1 :], "--max-new-tokens", 1) == 0
    assert run(*report, "--table", "table.csv") == 0 and Path("report.html").stat().st_size
    with Path("table.csv").open(encoding="utf-8") as file:
        table = [*csv.DictReader(file)]
    rows = {row["method"].split()[0]: float(row["achieved_ratio"]) for row in table}
    assert {"full", "random", "downscale", "uniform", "visionzip", "kcenter"} <= rows.keys()
    assert rows["visionzip"] == rows["kcenter"] == rows["random"] == pytest.approx(0.5)
