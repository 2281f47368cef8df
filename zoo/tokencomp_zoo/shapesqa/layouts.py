"""Writes ShapesQA to disk: free form, MVBench layout and MLVU layout, media as real files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tokencomp.storage import replace_file, write_lines
from tokencomp.zoo.shapesqa.items import Item, item
from tokencomp.zoo.shapesqa.prompt_forms import mlvu_question
from tokencomp.zoo.shapesqa.render import write_mp4

T = TypeVar("T")

# ShapesQA family -> (MVBench task, folder in which lmms-eval looks for its videos)
MVBENCH_TASKS = {
    "video_existence": ("object_existence", "clevrer/video_validation"),
    "direction": ("moving_direction", "clevrer/video_validation"),
    "action_count": ("action_count", "perception/videos"),
    "order": ("character_order", "perception/videos"),
}
# ShapesQA family -> MLVU task type
MLVU_TASKS = {"needle": "needle", "order": "order", "action_count": "count"}


def write_media(item: Item, folder: Path) -> Item:
    """Write the JPEG or mp4 of one item into ``folder``; returns the item with its path.

    Existing files are used again, so a run that is stopped must not leave a part of one.
    """
    if item.kind == "image":
        picture = item.image()
        path = folder / f"{item.id}.jpg"
        replace_file(path, lambda part: picture.save(part, "JPEG", quality=92))
    else:
        path = folder / f"{item.id}.mp4"
        replace_file(path, lambda part: write_mp4(item.scene, part))
    return replace(item, media=path)


def record(item: Item, root: Path) -> dict:
    """One row of the free-form file; media paths are relative to ``root``."""
    if item.media is None:
        raise ValueError(f"{item.id}: write its media first.")
    return {
        "id": item.id,
        "family": item.family,
        "kind": item.kind,
        "media": item.media.relative_to(root).as_posix(),
        "question": item.question,
        "answer": item.answer,
        "options": list(item.options),
        "letter": item.letter,
        "evidence": {
            "boxes": [list(box) for box in item.evidence.boxes],
            "frames": list(item.evidence.frames),
        },
    }


def write_freeform(items: Iterable[Item], root: Path) -> Path:
    """``root/questions.jsonl``, ``root/media/*`` and a card. Returns the path of the JSONL file."""
    rows = [record(write_media(one, root / "media"), root) for one in _shown(items, "files")]
    write_lines(root / "questions.jsonl", rows)
    _write_card(root, {"default": "questions.jsonl"}, split="test")
    return root / "questions.jsonl"


def write_mvbench(root: Path, split: str, per_task: int) -> None:
    """The layout of the MVBench dataset, for lmms-eval's ``mvbench_*`` tasks.

    ``root/json/<task>.json`` holds ``video``, ``question``, ``candidates`` and ``answer``;
    ``root/video/<folder>/<video>`` the clips; ``root/README.md`` the configs that ``datasets``
    reads. Only the tasks of :data:`MVBENCH_TASKS` are written.
    """
    (root / "json").mkdir(parents=True, exist_ok=True)
    for family, (task, folder) in MVBENCH_TASKS.items():
        rows = []
        for index in _shown(range(per_task), task):
            one = write_media(item(split, family, index), root / "video" / folder)
            assert one.media is not None
            rows.append(
                {
                    "video": one.media.name,
                    "question": one.question,
                    "candidates": list(one.options),
                    "answer": one.answer,
                }
            )
        (root / "json" / f"{task}.json").write_text(json.dumps(rows, indent=1) + "\n")
    configs = {task: f"json/{task}.json" for task, _ in MVBENCH_TASKS.values()}
    _write_card(root, configs, split="train")


def write_mlvu(root: Path, split: str, per_task: int) -> None:
    """The layout of the MLVU dev set, for lmms-eval's ``mlvu_dev`` task.

    ``root/test.jsonl`` holds ``video_name`` (relative to ``root``), ``question`` with its options,
    ``candidates``, ``answer`` (a letter), ``task_type`` and ``duration`` in seconds.
    """
    rows = []
    for index in _shown(range(per_task), "MLVU"):
        for family, task in MLVU_TASKS.items():
            one = write_media(item(split, family, index), root / "video" / task)
            assert one.media is not None
            rows.append(
                {
                    "video_name": one.media.relative_to(root).as_posix(),
                    "duration": one.scene.frames * 4 / 8,
                    "question": mlvu_question(one.query),
                    "candidates": list(one.options),
                    "answer": one.letter,
                    "task_type": task,
                }
            )
    write_lines(root / "test.jsonl", rows)
    _write_card(root, {"default": "test.jsonl"}, split="test")


def _shown(of: Iterable[T], what: str) -> Iterable[T]:
    """The same with a progress bar in a terminal."""
    from tqdm.auto import tqdm

    return tqdm(of, f"rendering {what}", leave=False, disable=None)


def _write_card(root: Path, configs: dict[str, str], split: str) -> None:
    """README.md whose front matter lets ``datasets.load_dataset(root, config)`` find the files."""
    lines = ["---", "configs:"]
    for name, path in configs.items():
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}"]
        lines += [f"    path: {path}"]
    lines += ["---", "", "ShapesQA, written by tokencomp.", ""]
    (root / "README.md").write_text("\n".join(lines))
