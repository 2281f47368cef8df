"""Items, or facts of long answers, that only the full model has right, with pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokencomp.evaluation.batches import Answerer, Loaded
from tokencomp.evaluation.runs import EvalRun
from tokencomp.inputs.questions import Example
from tokencomp.inputs.video.frames import Frames
from tokencomp.inputs.video.scorer import with_scorer
from tokencomp.pages.pictures import SIDE, kept_picture, save_picture
from tokencomp.storage import keeping, write_json

FILE = "lost.json"
PER_KIND = 3
KINDS = ("image", "video")


@dataclass(frozen=True)
class LostItem:
    """One item that compression loses: what both models answer, and the file of its picture.

    `facts`: of an answer made of facts, the facts that only the full model has.
    """

    id: str
    kind: str
    question: str
    answer: str
    full: str
    compressed: str
    picture: str
    facts: str = ""


def lost_ids(run: EvalRun, full: EvalRun, kind: str | None = None) -> list[str]:
    """Ids of items, all or of a `kind`, that only `full` has right, or facts of; natural order."""
    compressed = {r["id"]: r for r in run.answered if kind in (None, r.get("kind"))}
    return sorted(
        (r["id"] for r in full.answered if _lost(r, compressed.get(r["id"]))), key=_natural
    )


def can_lose(record: dict[str, Any]) -> bool:
    """Whether a record of the full model has anything right."""
    return any(record["facts"]) if "facts" in record else float(record["correct"]) >= 0.5


def _lost(full: dict[str, Any], compressed: dict[str, Any] | None) -> bool:
    if compressed is None or not can_lose(full):
        return False
    if "facts" in full:
        return bool(_lost_facts(full, compressed))
    return float(compressed["correct"]) < 0.5


def _lost_facts(full: dict[str, Any], compressed: dict[str, Any]) -> list[int]:
    """Numbers of the facts that only the full model has."""
    pairs = zip(full.get("facts", ()), compressed.get("facts", ()), strict=True)
    return [k for k, (there, here) in enumerate(pairs) if there and not here]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which "task/9" comes before "task/10"."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def draw_lost(
    model: Any,
    processor: Any,
    run: EvalRun,
    full: EvalRun,
    examples: Mapping[str, Example],
    folder: Path,
    *,
    frames: Frames = 8,
    per_kind: int = PER_KIND,
    side: int = SIDE,
) -> list[LostItem]:
    """Draw what was kept of the first lost items about images, and of the first about videos.

    At most `per_kind` of each, among `examples` (by id; with several processes, one's share). Each
    runs once more to record kept tokens. Pictures in `folder` have `side` pixels.
    """
    assert run.setting is not None
    chosen = []
    for kind in KINDS:
        names = [name for name in lost_ids(run, full, kind) if name in examples]
        chosen += [(kind, name) for name in names[:per_kind]]
    whole = {r["id"]: r for r in full.answered}
    kept = {r["id"]: r for r in run.answered}
    items, answerer = [], Answerer({"": model}, processor, {})
    frames = with_scorer(frames, model, processor)
    folder.mkdir(parents=True, exist_ok=True)
    with answerer.patches:
        for number, (kind, name) in enumerate(chosen):
            row: Loaded = (examples[name], examples[name].load(frames))
            stats, record = answerer.prefill(run.setting, [row])[0], kept[name]
            assert stats
            picture = f"lost-{run.setting.label}-{number}.jpg"
            save_picture(kept_picture(row[1], stats, side), folder / picture, quality=80)
            question = record.get("prompt", row[0].prompt)
            said, facts = whole[name]["prediction"], row[0].facts
            lost = [facts.wordings[k][0] for k in _lost_facts(whole[name], record)] if facts else []
            answers = (record["answer"], said, record["prediction"])
            items.append(LostItem(name, kind, question, *answers, picture, "; ".join(lost)))
    return items


def write_lost(folder: Path, items: Sequence[LostItem]) -> None:
    """Write the list of lost items to a run folder, next to their pictures."""
    with keeping(folder):
        write_json(folder / FILE, [asdict(item) for item in items])


def read_lost(folder: Path) -> list[LostItem]:
    """The list that `write_lost` wrote to a run folder; empty without one."""
    file = folder / FILE
    listed = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return [LostItem(**item) for item in listed]
