"""Accuracy of tiny trained models on a vLLM that merges, next to `tokencomp.patch`.

    python -m benchmarks.serving.merging             # → merging.json, merging.md
    python -m benchmarks.serving.merging --report    # only rebuilds the page

Both sides answer the same questions about images of ShapesQA, with the default method: a server,
started with `--merge auto`, through OpenAI's client, and the patched model on transformers. Ratio
and merging are per request. Needs vLLM and the package `openai`.
"""

from __future__ import annotations

import argparse
import base64
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.gpu.load import server
from benchmarks.serving.run import ENV, vllm_version
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.inputs.questions import Example
from tokencomp.zoo import load
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

FAMILIES = ("attribute", "small_object", "existence", "count", "position")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"ratio": 0.0},
    *({"ratio": r, **more} for r in (0.5, 0.75, 0.9) for more in ({}, {"merge": False})),
)
VLLM = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "8"]
TOKENS = 16


def from_patch(name: str, examples: list[Example]) -> list[list[str]]:
    """Answers of the patched model, by setting."""
    model, processor = load(name)
    answers = []
    for setting in SETTINGS:
        texts: list[str] = []
        with tokencomp.patch(model, **setting):
            for start in range(0, len(examples), 20):
                rows = examples[start : start + 20]
                media = [example.load(8) for example in rows]
                inputs = build_inputs(processor, media, [example.prompt for example in rows])
                texts += generate(model, processor, inputs, max_new_tokens=TOKENS)
        answers.append([text.strip() for text in texts])
    return answers


def from_vllm(name: str, examples: list[Example], log: Path) -> list[list[str]]:
    """Answers of a server on vLLM, by setting; eight clients ask at once."""
    import openai

    os.environ.update(ENV, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    arguments = ["--engine", "vllm", "--merge", "auto", "--", *VLLM]
    with server(name, arguments, log) as url, ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)

        def ask(example: Example, setting: dict[str, Any]) -> str:
            data = base64.b64encode(Path(example.media[0]).read_bytes()).decode()
            url = {"url": f"data:image/jpeg;base64,{data}"}
            content = [
                {"type": "image_url", "image_url": url},
                {"type": "text", "text": example.prompt},
            ]
            answer = client.chat.completions.create(
                model="model", max_tokens=TOKENS, temperature=0, extra_body={"tokencomp": setting},
                messages=[{"role": "user", "content": content}],
            )  # type: ignore[call-overload]  # fmt: skip
            return str(answer.choices[0].message.content).strip()

        return [
            list(pool.map(lambda example, s=setting: ask(example, s), examples))
            for setting in SETTINGS
        ]


def rows_of(name: str, examples: list[Example], log: Path) -> list[dict[str, Any]]:
    """For every setting: accuracies of both sides, and how many answers are the same."""
    sides = {"vllm": from_vllm(name, examples, log), "patch": from_patch(name, examples)}
    rows = []
    for i, setting in enumerate(SETTINGS):
        row: dict[str, Any] = {"model": name, **setting, "items": len(examples)}
        for side, answers in sides.items():
            pairs = zip(examples, answers[i], strict=True)
            row[side] = sum(example.correct(text) for example, text in pairs)
        both = zip(*(answers[i] for answers in sides.values()), strict=True)
        row["equal"] = sum(a == b for a, b in both)
        rows.append(row)
        print(row, flush=True)
    return rows


def page(report: dict[str, Any]) -> str:
    """Everything as a Markdown page."""
    head = ("model", "ratio", "other tokens", "vLLM, %", "`tokencomp.patch`, %", "equal answers")
    cells = []
    for row in report["rows"]:
        merged = "merged" if row.get("merge", True) else "dropped"
        how = merged if row["ratio"] else "none"
        shares = [f"{100 * row[side] / row['items']:.1f}" for side in ("vllm", "patch")]
        equal = f"{row['equal']} of {row['items']}"
        cells.append([row["model"], f"{row['ratio']:g}", how, *shares, equal])
    method = (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip()
    return (
        "# Is a vLLM that merges as accurate as `tokencomp.patch`?\n\n"
        f"{method}\n\n{publishing.table(head, cells, right=3)}\n\n"
        f"float32, vLLM {report['vllm']}. [All benchmark pages](../README.md)."
    )


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of every model."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        asked = shapesqa(items("test", args.per_family, families=FAMILIES), work)
        for name in args.models:
            rows += rows_of(name, asked, Path(work) / f"{name}.log")
            yield {"vllm": vllm_version(), "rows": rows}


OPTIONS = {"models": ["tiny-qwen2-vl", "tiny-qwen3-vl"], "per_family": 20}
EXPERIMENT = Experiment("serving/merging", measure, page, options=OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
