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
SHOWN = 3
CHOICE = (
    f"{SHOWN} of the questions, those first that the last method answers and random dropping does "
    "not. The table counts all of them."
)
Say = Callable[[str], None]


def make_demo(model: Any, processor: Any, name: str, settings: Sequence[Setting], say: Say) -> Demo:
    """Accuracy on questions about the packaged sample files, and some of the answers."""
    examples, asked = packaged_questions(), seeded(settings, SEEDS)
    say(f"asking {len(examples)} questions under {len(asked)} settings")
    how: dict[str, Any] = {"batch_size": 18, "max_new_tokens": 4, "name": name}
    runs = sweep(model, processor, examples, asked, **how)
    say(f"answering {SHOWN} questions one by one, for the pictures")
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
    """The questions that show most, about a file each: see `CHOICE`."""
    last = runs[shown[-1]].scores
    luck = [runs[s].scores for s in shown if s.name == RANDOM]

    def order(example: Example) -> tuple[bool, bool]:
        right = last.get(example.id, 0.0) >= 0.5
        lost = all(scores.get(example.id, 1.0) < 0.5 for scores in luck)
        return not (right and lost), not right

    by_file: dict[Any, list[Example]] = {}
    for example in packaged_questions():
        by_file.setdefault(example.media, []).append(example)
    return sorted((min(some, key=order) for some in by_file.values()), key=order)[:SHOWN]


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
