"""The work behind `tokencomp demo`: a table, answers, pictures and an HTML report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokencomp.cli._showcase import PromptMaker, answer_prompt, time_prefill
from tokencomp.evaluation.environment import environment
from tokencomp.evaluation.rivals import paired_tests
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.inputs.questions import Example
from tokencomp.pages.demo import AnsweredQuestion, Demo, Row

TIMED_ROWS = 8
Say = Callable[[str], None]


def demo_embedded(
    model: Any,
    processor: Any,
    name: str,
    settings: Sequence[Setting],
    picture_ratio: float,
    say: Say,
) -> Demo:
    """Accuracy, time on videos, and answers about the packaged sample files."""
    examples = packaged_questions()
    say(f"{len(examples)} questions, {len(settings)} settings")
    how: dict[str, Any] = {"batch_size": 18, "max_new_tokens": 4, "name": name}
    runs = sweep(model, processor, examples, settings, **how)
    videos = [e for e in examples if str(e.media[0]).endswith(".mp4")][:TIMED_ROWS]
    say("timing the prefill of every setting in turn")
    rows = _rows(model, processor, videos, settings, runs, budget=3.0)
    say("answering questions about the sample files")
    some, questions = [s for s in settings if s.name == FULL or s.ratio == picture_ratio], []
    for e in samples():
        answers = answer_prompt(model, processor, e.load(8), e.prompt, some, max_new_tokens=8)
        questions.append(AnsweredQuestion(Path(e.media[0]).name, e.prompt, e.answer, answers))
    full = runs[Setting()]
    counts = len(full.answered), len(full.failed)
    return Demo(name, model_facts(model), rows, questions, *counts)


def demo_files(
    model: Any,
    processor: Any,
    name: str,
    settings: Sequence[Setting],
    media: Sequence[Any],
    label: str,
    question: str,
    say: Say,
) -> Demo:
    """Answers, cost, time and pictures for the user's own files."""
    say("answering with and without compression")
    answers = answer_prompt(model, processor, media, question, settings)
    say("timing the prefill of every setting in turn")
    rows = _rows(model, processor, [Example("prompt", question, "", tuple(media))], settings, None)
    return Demo(name, model_facts(model), rows, [AnsweredQuestion(label, question, None, answers)])


def packaged_questions() -> list[Example]:
    """The questions about the packaged sample files."""
    from tokencomp.zoo import SAMPLES

    rows = json.loads((SAMPLES / "questions.json").read_text())
    return [
        Example(f"{n} {r['id']}", r["question"], r["answer"], (SAMPLES / r["media"],), r["family"])
        for n, r in enumerate(rows)
    ]


def samples() -> list[Example]:
    """The first question about each packaged sample file."""
    first: dict[Any, Example] = {}
    for example in packaged_questions():
        first.setdefault(example.media, example)
    return list(first.values())


def _rows(
    model: Any,
    processor: Any,
    timed: Sequence[Example],
    settings: Sequence[Setting],
    runs: dict[Setting, EvalRun] | None,
    budget: float = 8.0,
) -> list[Row]:
    media, texts = [e.load(8) for e in timed], [e.prompt for e in timed]
    maker = PromptMaker(model, processor, media, texts)
    splits = time_prefill(maker, settings, budget=budget)
    rows = []
    for setting in settings:
        cost = _batch_cost(maker, setting)
        rows.append(
            Row(
                setting,
                split=splits[setting],
                prefill_ratio=splits[setting].llm / splits[Setting()].llm,
                moved=setting.moved(len(cost["per_layer"])),
                **cost,
                **(_accuracy(runs, setting) if runs else {}),
            )
        )
    return rows


def _batch_cost(maker: PromptMaker, setting: Setting) -> dict[str, Any]:
    """Means over the timed batch."""
    import torch

    from tokencomp.evaluation.patches import patched

    with patched(maker.model, setting) as handle, torch.inference_mode():
        maker.model(**maker.inputs(setting), use_cache=True, logits_to_keep=1)
        costs = maker.costs(setting, handle)
    n, layers = len(costs), range(len(costs[0].per_layer))
    return {
        "per_layer": [round(sum(c.per_layer[i] for c in costs) / n) for i in layers],
        "ratio": sum(c.ratio for c in costs) / n,
        "flops": sum(c.flops for c in costs) / n,
        "kv_bytes": sum(c.kv_bytes for c in costs) / n,
    }


def _accuracy(runs: dict[Setting, EvalRun], setting: Setting) -> dict[str, Any]:
    from tokencomp.shapesqa.difficulty import is_image_family

    run = runs[setting]
    values: dict[str, Any] = {"accuracy": run.mean("correct")}
    kinds: dict[str, list[float]] = {"image": [], "video": []}
    for record in run.answered:
        kind = "image" if is_image_family(record["family"]) else "video"
        kinds[kind].append(float(record["correct"]))
    values["by_kind"] = {k: sum(v) / len(v) for k, v in kinds.items() if v}
    if not setting.off and run.answered:
        values |= paired_tests(run, list(runs.values()))
    return values


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
