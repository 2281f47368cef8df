"""The support table: what is written, shown and compared of the results of conformance runs.

The page of a release and the counts in the README come from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import publishing
from tokencomp.adapters.verified import PASSED, STATUSES, TESTED, load, nearest
from tokencomp.conformance.checks import EFFECT, TOLERANCE
from tokencomp.conformance.turns import TURNS

MEANING = {
    "exact": "at entry and between layers",
    "entry only": "exact at entry; stages between layers are refused, or did not pass",
    "refused": "`patch` raises, with the reason",
    "unverified": "not checked, or a check failed: `patch` refuses it unless `verify=True` passes",
}
LATER = ("fastv", "prune", "pyramiddrop")  # reducers that act between layers
CHECKS = ("entry", "entry decode", "batch", "layers", "layers decode", "condiv", *LATER, "effect")
CALLS = ("merge", "merge decode", *TURNS)
AFTER = (
    "What runs under the default and what runs on a cache: prompt and decode steps of the default,",
    "which merges; a later turn of words, and of media; beams, whose caches are reordered; other",
    "words after `crop`; prompt lookup; a prefill in pieces; a static cache. The default prompt is",
    "compared with the whole model in which tokens are merged by a plain loop; all others, under",
    "dropping and under the default, alone and in a ragged batch, with the same ids without a",
    'cache. "unpatched": the model fails there by itself.',
)

SCORES = (
    "Columns named after reducers: half of the work leaves by the attention that they read;",
    "the last logits of the prompt and those of decode steps count. Else tokens leave by place.",
)


def new_table(results: Mapping[str, Any]) -> dict[str, Any]:
    """A table of results of the installed release, ready for JSON."""
    import torch
    import transformers

    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "tolerance": TOLERANCE,
        "least_effect": EFFECT,
        "types": dict(results),
    }


def save(table: Mapping[str, Any], path: Path) -> None:
    """Write a table as JSON, one line per type, so that changes can be read."""
    head = {k: v for k, v in table.items() if k != "types"}
    rows = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in table["types"].items()]
    body = ",\n".join(rows)
    text = json.dumps(head, indent=2)[:-2] + ',\n  "types": {\n' + body + "\n  }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def counts(table: Mapping[str, Any], image_text: bool = False) -> dict[str, int]:
    """Number of types by status; `image_text`: of those of the image-text-to-text mapping alone."""
    rows = [r for r in table["types"].values() if r.get("image_text") or not image_text]
    number = Counter(row["status"] for row in rows)
    return {status: number[status] for status in STATUSES}


def markdown(table: Mapping[str, Any]) -> str:
    """The page of a release."""
    number, images = counts(table), counts(table, image_text=True)
    lines = [
        f"# Model types of transformers {table['transformers']}",
        "",
        "Written by `python -m benchmarks.conformance`; do not edit. Every type of transformers'",
        "image-text-to-text and multimodal mappings is built with a tiny random decoder. Features",
        "are put in where the tower would return them, so no tower and no processor runs. The",
        "logits of all columns that are left, of a ragged batch with unequal keep counts, are",
        "compared with those of the whole model in which the same tokens are hidden.",
        "",
        "| status | types | of them image-text-to-text | meaning |",
        "| --- | --- | --- | --- |",
        *(f"| {s} | {number[s]} | {images[s]} | {MEANING[s]} |" for s in STATUSES),
        "",
        "Columns: largest difference of float32 logits, in units of their standard deviation,",
        f"allowed {table['tolerance']:.0e}; effect: how much compression changes them, at least "
        f"{table['least_effect']:.0e}.",
        *(SCORES if any("condiv" in row["errors"] for row in table["types"].values()) else ()),
        "",
        f"`patch` also accepts {', '.join(sorted(TESTED))}, tested with a real tower instead.",
        "",
    ]
    for status in STATUSES:
        rows = {k: r for k, r in table["types"].items() if r["status"] == status}
        if rows:
            lines += [f"## {status.capitalize()}", ""]
            if status in PASSED:
                lines += _measured(rows, status)
                lines += _calls(rows)
                lines += _reasons(rows, "refusals", "Refused:", skip=status != "exact")
                lines += _reasons(rows, "unpatched", "The unpatched model fails by itself:")
            else:
                reasons = [(name, first_sentence(row["reason"])) for name, row in rows.items()]
                lines += _table(["model type", "reason"], reasons)
    return "\n".join(lines).rstrip() + "\n"


def _measured(rows: Mapping[str, Any], status: str) -> list[str]:
    known = {c for row in rows.values() for c in (*row["errors"], *row.get("refusals", ()))}
    checks = [c for c in CHECKS if c in known]
    if status != "exact":
        checks = [c for c in checks if c not in (*LATER, "layers", "layers decode")]
    head = ["model type", *checks, *(["why entry only"] if status != "exact" else [])]
    lines = []
    for name, row in rows.items():
        why = [first_sentence(row["reason"])] if status != "exact" else []
        lines.append([name, *(_cell(row, check) for check in checks), *why])
    return _table(head, lines)


def _calls(rows: Mapping[str, Any]) -> list[str]:
    """What runs after a prompt, by model type."""
    if not any(check in row["errors"] for row in rows.values() for check in CALLS):
        return []
    lines = [[name, *(_cell(row, check) for check in CALLS)] for name, row in rows.items()]
    return [*AFTER, "", *_table(["model type", *CALLS], lines)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, and an empty line."""
    return [publishing.table(head, rows, rule=" --- "), ""]


def _reasons(rows: Mapping[str, Any], key: str, title: str, skip: bool = False) -> list[str]:
    """Which checks the package refuses or the unpatched model fails, and why.

    `skip` leaves out reducers that read attention.
    """
    lines = []
    for name, row in rows.items():
        reasons: dict[str, list[str]] = {}
        for check, reason in row.get(key, {}).items():
            if not skip or check in CALLS:
                reasons.setdefault(first_sentence(reason), []).append(check)
        lines += [(name, ", ".join(own), why) for why, own in reasons.items()]
    return [title, "", *_table(["model type", "checks", "reason"], lines)] if lines else []


def _cell(row: Mapping[str, Any], check: str) -> str:
    if check in row.get("unpatched", {}):
        return "unpatched"
    return "refused" if check in row.get("refusals", {}) else _number(row["errors"].get(check))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if value >= 0.01 or value == 0 else f"{value:.0e}"


def first_sentence(reason: str, limit: int = 160) -> str:
    """The start of a message, without what would break a table."""
    text = " ".join(reason.replace("|", "/").split())
    text = text.partition(". ")[0]
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def worse(table: Mapping[str, Any]) -> dict[str, str]:
    """Types of a run that do worse than in the kept results that `patch` goes by.

    These are the results of the run's own release, or else of the `nearest` one.

    Returns
    -------
    dict
        Type → what has changed.
    """
    kept = load(nearest(table["transformers"]))["types"]
    rank = {"exact": 0, "entry only": 1, "refused": 2, "unverified": 2}
    changes = {}
    for name, row in table["types"].items():
        kept_row = kept.get(name, {"status": "unverified", "errors": {}})
        before, refusals = kept_row["status"], row.get("refusals", {})
        lost = [r for r in refusals if r in kept_row["errors"] and r not in row["errors"]]
        if rank[row["status"]] > rank[before]:
            changes[name] = f"was {before}, is {row['status']}: {first_sentence(row['reason'])}"
        elif lost:
            changes[name] = f"refuses {', '.join(lost)}: {first_sentence(refusals[lost[0]])}"
    return changes
