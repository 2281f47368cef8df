"""Implementation of `tokencomp demo`: a table, answers and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokencomp.cli._showcase import answer_prompt
from tokencomp.evaluation.environment import environment
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL, RANDOM, Setting, seeded
from tokencomp.inputs.questions import Example
from tokencomp.pages.demo import AnsweredQuestion, Demo
from tokencomp.pages.report import lines

SEEDS = 3
CHOICE = (
    "Of the questions about each file, the first one is shown that the last method answers and "
    "random dropping does not; if there is none, the first that the last method answers. "
    "The table has all of them."
)
Say = Callable[[str], None]


def make_demo(model: Any, processor: Any, name: str, settings: Sequence[Setting], say: Say) -> Demo:
    """Accuracy on questions about the packaged sample files, and some of the answers."""
    examples, asked = packaged_questions(), seeded(settings, SEEDS)
    say(f"{len(examples)} questions, {len(asked)} settings")
    how: dict[str, Any] = {"batch_size": 18, "max_new_tokens": 4, "name": name}
    runs = sweep(model, processor, examples, asked, **how)
    say("answering questions about the sample files")
    ratios = {setting.ratio for setting in settings}
    ratio = 0.75 if 0.75 in ratios else max(ratios)
    some, questions = [s for s in settings if s.name == FULL or s.ratio == ratio], []
    for e in samples(runs, some):
        answers = answer_prompt(model, processor, (e, e.load(8)), some, max_new_tokens=8)
        questions.append(AnsweredQuestion(Path(e.media[0]).name, e.prompt, e.answer, answers))
    return Demo(name, model_facts(model), lines(list(runs.values())), questions, CHOICE)


def packaged_questions() -> list[Example]:
    """The questions about the packaged sample files."""
    from tokencomp.zoo import SAMPLES

    rows = json.loads((SAMPLES / "questions.json").read_text())
    return [
        Example(f"{n} {r['id']}", r["question"], r["answer"], (SAMPLES / r["media"],), r["family"])
        for n, r in enumerate(rows)
    ]


def samples(runs: dict[Setting, EvalRun], shown: Sequence[Setting]) -> list[Example]:
    """One question about each packaged sample file: see `CHOICE`."""
    own = [runs[s].scores for s in shown if s.name not in (FULL, RANDOM)]
    luck = [runs[s].scores for s in shown if s.name == RANDOM]

    def order(example: Example) -> tuple[bool, bool]:
        lost = [scores.get(example.id, 1.0) < 0.5 for scores in luck]
        right = [scores.get(example.id, 0.0) >= 0.5 for scores in own[-1:]]
        return not (all(lost) and all(right)), not all(right)

    by_file: dict[Any, list[Example]] = {}
    for example in packaged_questions():
        by_file.setdefault(example.media, []).append(example)
    return [min(some, key=order) for some in by_file.values()]


def model_facts(model: Any) -> dict[str, Any]:
    from tokencomp.adapters.registry import adapter_for

    adapter = adapter_for(model)
    return {
        **environment(),
        "family": adapter.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(adapter.layers),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
