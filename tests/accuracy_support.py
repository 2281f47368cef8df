"""Made-up results of the accuracy benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokencomp.evaluation.runner import Run
from tokencomp.evaluation.settings import Setting

ITEMS = 40
BLIND = {"attribute": 0.25, "position": 0.5, "needle": 0.25}
SHARES = {"full": 0.7, "random-0.9": 0.35, "uniform-0.9": 0.5, "downscale-0.9": 0.65}


def made_run(**more: Any) -> dict[str, Any]:
    versions = dict.fromkeys(("torch", "transformers", "tokencomp"), "1")
    where = {"hardware": {"cpu": "none", "threads": 1}, "commit": None, "date": "2000-01-01"}
    return {"versions": versions, "command": "by hand", **where, **more}


def made_up(
    folder: Path, right: dict[str, float], split: str = "test", name: str = "made-up"
) -> Path:
    """Results in which `label` answers the first `share` of every family's items rightly."""
    rows = []
    for family in BLIND:
        for i in range(ITEMS):
            correct = {k: int(i < share * ITEMS) for k, share in right.items()}
            said = {k: "abcd"[i % 4] if c else "no" for k, c in correct.items()}
            about = {
                "id": f"{family}-{i}",
                "family": family,
                "prompt": "?",
                "answer": "abcd"[i % 4],
            }
            rows.append({**about, "predictions": said, "correct": correct})
    settings = {label: setting(label) for label in right}
    about = {"model": name, "split": split, "items": len(rows)}
    manifest = {**about, "runs": [made_run()], "settings": settings}
    where = folder / name
    where.mkdir(parents=True, exist_ok=True)
    (where / f"{split}.json").write_text(json.dumps(manifest))
    (where / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return where


def setting(label: str) -> dict[str, Any]:
    name, _, ratio = label.partition("-")
    ratio = float(ratio.partition("-")[0] or 0)
    cost = {"achieved_ratio": ratio, "flops": 100 - 50 * ratio, "run": 0}
    return {"reducer": name, "ratio": ratio, "options": {}, **cost}


def answers(right: dict[str, list[bool]], **facts: Any) -> dict[Setting, Run]:
    """Two items, asked under settings by label."""
    identity = {"weights": "w", "dtype": "float32", "pixels": {}, "frames": 8}
    identity |= {"max_new_tokens": 16, "seed": 0, **facts}
    shared = {"attention": "sdpa", "batch_size": 2, **made_run(), "identity": identity}
    runs = {}
    for label, scores in right.items():
        name, _, ratio = label.partition("-")
        cost = {"ratio": float(ratio or 0), "flops": 1, "kv_bytes": 1}
        about = {"family": "attribute", "prompt": "?", "answer": "a"}
        rows = [
            {"id": str(i), **about, "prediction": "ab"[not s], "correct": s, **cost}
            for i, s in enumerate(scores)
        ]
        runs[Setting(name, float(ratio or 0))] = Run(Setting(), rows, shared)
    return runs
