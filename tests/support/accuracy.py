"""Results of the accuracy benchmark that tests make up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers, write_sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import Setting

ITEMS = 40
BLIND = {"attribute": 0.25, "position": 0.5, "needle": 0.25}
SHARES = {"full": 0.7, "random-0.9": 0.35, "uniform-0.9": 0.5, "downscale-0.9": 0.65}


def run_facts(**more: Any) -> dict[str, Any]:
    versions = dict.fromkeys(("torch", "transformers", "tokencomp"), "1")
    where = {"hardware": {"cpu": "none", "threads": 1}, "commit": None, "date": "2000-01-01"}
    return {"versions": versions, "command": "by hand", **where, **more}


def answer_record(name: str, family: str, correct: bool, answer: str = "a") -> dict[str, Any]:
    """The record of one question; wrong answers are "no"."""
    about = {"id": name, "family": family, "prompt": "?", "answer": answer}
    return {**about, "prediction": answer if correct else "no", "correct": correct}


def write_results(
    folder: Path,
    shares: dict[str, float],
    split: str = "test",
    name: str = "made-up",
    items: int = ITEMS,
    families: tuple[str, ...] = tuple(BLIND),
    bonus: dict[tuple[str, str], float] | None = None,
) -> Path:
    """Results in which `label` answers the first `share` of every family's questions correctly.

    `bonus` has other shares by family and label.
    """
    runs = {label: EvalRun(None) for label in shares}
    for family in families:
        for label, share in shares.items():
            count = (bonus or {}).get((family, label), share) * ITEMS
            runs[label].records += [
                answer_record(f"{split}-{family}-{i:05d}", family, i < count, "abcd"[i % 4])
                for i in range(items)
            ]
    manifest = {
        "model": name,
        "split": split,
        "items": len(families) * items,
        "blind": BLIND,
        "runs": [run_facts()],
        "settings": {label: setting(label) for label in shares},
    }
    model_folder = folder / name
    model_folder.mkdir(parents=True, exist_ok=True)
    answers = PackedAnswers.of(runs, "full").to_json()
    write_sweep(model_folder / f"{split}.json", manifest, answers)
    return model_folder


def setting(label: str) -> dict[str, Any]:
    name, _, ratio = label.partition("-")
    ratio = float(ratio.partition("-")[0] or 0)
    cost = {"achieved_ratio": ratio, "flops": 100 - 50 * ratio, "run": 0}
    return {"reducer": name, "ratio": ratio, "options": {}, **cost}


def sweep_runs(scores: dict[str, list[bool]], **facts: Any) -> dict[Setting, EvalRun]:
    """Runs of a sweep over two questions, by label."""
    identity = {"weights": "w", "dtype": "float32", "pixels": {}, "frames": 8}
    identity |= {"max_new_tokens": 16, "seed": 0, **facts}
    shared = {"attention": "sdpa", "batch_size": 2, **run_facts(), "identity": identity}
    runs = {}
    for label, correct in scores.items():
        name, _, ratio = label.partition("-")
        cost = {"ratio": float(ratio or 0), "flops": 1, "kv_bytes": 1}
        rows = [{**answer_record(str(i), "attribute", s), **cost} for i, s in enumerate(correct)]
        runs[Setting(name, float(ratio or 0))] = EvalRun(Setting(), rows, shared)
    return runs
