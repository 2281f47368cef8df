"""What a sweep leaves behind: every answer, and how it was made; later runs add to it.

`results/MODEL/SPLIT.jsonl` has one line per item with the answers of every setting. `SPLIT.json`
has for every setting what it cost and the number of the run that asked it, and for every run its
command, versions, commit, hardware and weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.runner import Run
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.shapesqa.questions import IMAGE_FAMILIES
from tokencomp.trained.cards import replace_file, write_json
from tokencomp.zoo import metrics

RESULTS = Path(__file__).parent / "results"
KINDS = ("images", "videos")
BARS = {0.5: 0.97, 0.75: 0.97, 0.9: 0.94, 0.95: 0.80}
"""Retention that the default has to reach, on images and on videos of every model."""
MARGIN = 0.25
MADE = ("date", "command", "versions", "commit", "hardware", "attention", "batch_size")
GIVEN = ("weights", "dtype", "pixels", "frames", "max_new_tokens", "seed")


def kind_of(family: str) -> str:
    return "images" if family in IMAGE_FAMILIES else "videos"


@dataclass(frozen=True)
class Results:
    """One model on one split.

    Attributes
    ----------
    manifest
        Model, split, runs, settings.
    rows
        Per item: id, family, prompt, answer, and by label predictions and correct (0 or 1).
    learned
        Families that the model has learned, see `learned_families`.
    """

    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    learned: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path, split: str) -> Results:
        manifest = json.loads((folder / f"{split}.json").read_text())
        told = (folder, RESULTS / folder.name)
        known = [f / "validation.jsonl" for f in told if (f / "validation.jsonl").exists()]
        learned = learned_families(folder.name, _lines(known[0])) if known else ()
        return cls(manifest, _lines(folder / f"{split}.jsonl"), tuple(learned))

    def write(self, folder: Path) -> None:
        """Both files, each whole or not at all."""
        text, split = "".join(json.dumps(r) + "\n" for r in self.rows), self.manifest["split"]
        replace_file(folder / f"{split}.jsonl", lambda part: part.write_text(text))
        write_json(folder / f"{split}.json", self.manifest)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        return self.manifest["settings"]

    def of(self, kind: str, families: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Rows of images, of videos, or of both; of `families` alone, if given."""
        wanted = None if families is None else set(families)
        kinds = {kind} & {*KINDS} or {*KINDS}
        return [
            r
            for r in self.rows
            if kind_of(r["family"]) in kinds and (wanted is None or r["family"] in wanted)
        ]

    def scores(
        self, label: str, kind: str = "both", families: Iterable[str] | None = None
    ) -> list[int]:
        """0 or 1 per item, in the order of the items."""
        return [r["correct"][label] for r in self.of(kind, families)]

    def accuracy(self, label: str, family: str) -> float:
        found = self.scores(label, families=[family])
        return sum(found) / len(found)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(r["family"] for r in self.rows))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if self.of(kind)]

    @property
    def ratios(self) -> list[float]:
        return sorted({s["ratio"] for s in self.settings.values() if s["ratio"]})

    def reached(self, label: str, kind: str) -> float:
        """Achieved ratio on images, on videos, or the smaller of the two."""
        one = self.settings[label]
        by_kind = one.get("achieved", {})
        return by_kind.get(kind, min([*by_kind.values(), one["achieved_ratio"]]))


def learned_families(model: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Families on which the full model beats a blind guess by 25 points on the validation split.

    The guess is the model card's: the commonest answer or one of the options, whichever scores
    better. Below that there is little to lose, so retention says little. Families that the
    validation run left out count as not learned.
    """
    blind, found = metrics(model)["blind"], []
    for family in dict.fromkeys(r["family"] for r in rows):
        right = [r["correct"][FULL] for r in rows if r["family"] == family]
        if sum(right) / len(right) >= blind[family] + MARGIN:
            found.append(family)
    return found


def collected(runs: dict[Setting, Run], model: str, split: str) -> Results:
    """Answers of one sweep."""
    failed = {s.label: run.failed for s, run in runs.items() if run.failed}
    if failed:
        label, (first, *_) = next(iter(failed.items()))
        raise OptionError(f"{label}: {first['id']} was not answered ({first['error']}). Try again.")
    rows: dict[str, dict[str, Any]] = {}
    for setting, run in runs.items():
        for r in run.answered:
            row = rows.setdefault(r["id"], {k: r[k] for k in ("id", "family", "prompt", "answer")})
            row.setdefault("predictions", {})[setting.label] = r["prediction"]
            row.setdefault("correct", {})[setting.label] = int(r["correct"])
    first_run = next(iter(runs.values())).manifest
    facts = {**first_run["identity"], **first_run}
    manifest = {
        "model": model,
        "split": split,
        "items": len(rows),
        "runs": [{k: facts[k] for k in (*MADE, *GIVEN)}],
        "settings": {s.label: {**_cost(s, run), "run": 0} for s, run in runs.items()},
    }
    return Results(manifest, list(rows.values()))


def _cost(setting: Setting, run: Run) -> dict[str, Any]:
    """What was asked and what it cost. No time: the vision tower ran for the first setting only."""
    ratios: dict[str, list[float]] = {}
    for r in run.answered:
        ratios.setdefault(kind_of(r["family"]), []).append(r["ratio"])
    return {
        "reducer": setting.reducer,
        "method": setting.method,
        "ratio": setting.ratio,
        "options": setting.options,
        **run.summary(),
        "achieved": {kind: sum(found) / len(found) for kind, found in ratios.items()},
    }


def merged(old: Results, new: Results) -> Results:
    """Both; of settings asked again the new answers count.

    Raises
    ------
    OptionError
        They are of other items, or of another model.
    """
    fresh = {r["id"]: r for r in new.rows}
    asked = {k: (r["prompt"], r["answer"]) for k, r in fresh.items()}
    there = {r["id"]: (r["prompt"], r["answer"]) for r in old.rows}
    if asked != there or not _same_model(old, new):
        raise OptionError(
            f"the {old.manifest['split']} results of {old.manifest['model']} that are there are of "
            "other items or other weights than those asked now, and cannot stand in one table with "
            "them. Give another folder with --out."
        )
    parts = ("predictions", "correct")
    rows = [{**r, **{k: {**r[k], **fresh[r["id"]][k]} for k in parts}} for r in old.rows]
    runs = [*old.manifest["runs"], *new.manifest["runs"]]
    latest = {k: {**one, "run": len(runs) - 1} for k, one in new.settings.items()}
    settings = {**old.settings, **latest}
    used = sorted({one["run"] for one in settings.values()})
    settings = {k: {**one, "run": used.index(one["run"])} for k, one in settings.items()}
    manifest = {**old.manifest, "runs": [runs[i] for i in used], "settings": settings}
    return Results(manifest, rows, old.learned)


def _same_model(old: Results, new: Results) -> bool:
    """By the hash of the weights; of runs that did not note it, by what the full model said."""
    known = {run["weights"] for run in old.manifest["runs"] if "weights" in run}
    if known:
        return known == {run["weights"] for run in new.manifest["runs"]}
    said = {r["id"]: r["predictions"][FULL] for r in new.rows}
    return all(r["predictions"][FULL] == said[r["id"]] for r in old.rows)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
