"""Results of a sweep: which questions every setting answered correctly, its cost, its provenance.

`results/MODEL/SPLIT.json` holds one model on one split. Later runs are merged into it: the answers
of a setting that is run again replace the older ones. `benchmarks.accuracy.compact` has their form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers, read_sweep, write_sweep
from tokencomp.errors import OptionError
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import FULL, RANDOM, Setting, label_of
from tokencomp.method import DEFAULT_REDUCER
from tokencomp.pages.lost import LostItem
from tokencomp.zoo import metrics
from tokencomp.zoo.shapesqa.difficulty import is_image_family

ACCURACY = Path(__file__).parent
RESULTS = ACCURACY / "results"
MAIN = "tiny-qwen3-vl"
"""The model of the first tables."""
LOST = "lost"
"""Folder beside the results with pictures of what the default loses."""
STORED_DEFAULT = "condiv"
"""What results of release 0.1 call the default, whose condiv was a k-center on images."""
KINDS = ("images", "videos")
BARS = {0.5: 0.97, 0.75: 0.97, 0.9: 0.94, 0.95: 0.80}
"""Retention that the default has to reach, on images and on videos of every model."""
MARGIN = 0.25
"""Accuracy above a blind guess from which a family counts as learned."""
ENVIRONMENT = ("date", "command", "versions", "commit", "hardware", "attention", "batch_size")
IDENTITY = ("weights", "dtype", "pixels", "frames", "max_new_tokens", "seed")


def kind_of(family: str) -> str:
    return "images" if is_image_family(family) else "videos"


@dataclass(frozen=True)
class Results:
    """One model on one split.

    Attributes
    ----------
    manifest
        Model, split, runs, settings; of the validation split also the accuracy of a blind guess.
    answers
        Per setting label, which questions were answered correctly.
    learned
        Families that the model has learned, see `learned_families`.
    seeds
        By label of `random`, the scores under every seed, of results that are `averaged`.
    """

    manifest: dict[str, Any]
    answers: PackedAnswers
    learned: tuple[str, ...] = ()
    seeds: dict[str, list[list[int]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, split: str) -> Results:
        """Results of `split`; the learned families are those of the validation split.

        The validation results of the same folder decide, else the published ones of the model.
        """
        stored = read_sweep(folder / f"{split}.json")
        answers = PackedAnswers.from_json(stored.pop("answers"))
        folders = (folder, RESULTS / folder.name)
        files = [f / "validation.json" for f in folders if (f / "validation.json").exists()]
        learned = learned_families(read_sweep(files[0])) if files else ()
        return cls(stored, answers, learned)

    def averaged(self) -> Results:
        """The same with one setting in place of all seeds of `random`: their mean."""
        settings, seeds = dict(self.settings), {}
        correct: dict[str, Any] = dict(self.answers.correct)
        agrees: dict[str, Any] = dict(self.answers.agrees)
        for ratio in self.ratios:
            labels = [
                k
                for k, s in self.settings.items()
                if (s["reducer"], s["ratio"]) == (RANDOM, ratio) and s["options"].keys() <= {"seed"}
            ]
            if len(labels) > 1:
                first = labels[0]
                seeds[first] = [self.answers.correct[k] for k in labels]
                for part in (correct, agrees):
                    columns = zip(*(part.pop(k) for k in labels), strict=True)
                    part[first] = [sum(column) / len(labels) for column in columns]
                settings = {k: s for k, s in settings.items() if k not in labels[1:]}
                settings[first] = {**settings[first], "options": {}}
        answers = PackedAnswers(self.answers.questions, correct, agrees)
        return Results({**self.manifest, "settings": settings}, answers, self.learned, seeds)

    def write(self, folder: Path) -> None:
        path = folder / f"{self.manifest['split']}.json"
        write_sweep(path, self.manifest, self.answers.to_json())

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        return self.manifest["settings"]

    def select(self, kind: str, families: Iterable[str] | None = None) -> list[int]:
        """Positions of the questions about images, videos, or both; of `families` alone, if any."""
        allowed = None if families is None else set(families)
        kinds = {kind} & {*KINDS} or {*KINDS}
        return [
            i
            for i, family in enumerate(self.answers.questions.families)
            if kind_of(family) in kinds and (allowed is None or family in allowed)
        ]

    def scores(
        self, label: str, kind: str = "both", families: Iterable[str] | None = None
    ) -> list[float]:
        """0 or 1 per question, in the order of the questions; of several seeds the mean."""
        correct = self.answers.correct[label]
        return [correct[i] for i in self.select(kind, families)]

    def accuracy(self, label: str, family: str) -> float:
        scores = self.scores(label, families=[family])
        return sum(scores) / len(scores)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(self.answers.questions.families))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if self.select(kind)]

    @property
    def default(self) -> str:
        """What "auto" stands for on this model: another reducer where the default cannot run."""
        ran = {setting["reducer"] for setting in self.settings.values()}
        names = (DEFAULT_REDUCER, STORED_DEFAULT, "kcenter")
        return next((name for name in names if name in ran), STORED_DEFAULT)

    @property
    def ratios(self) -> list[float]:
        return sorted({s["ratio"] for s in self.settings.values() if s["ratio"]})

    def reached(self, label: str, kind: str) -> float:
        """Achieved ratio on images, on videos, or the smaller of the two."""
        setting = self.settings[label]
        by_modality = setting.get("achieved", {})
        return by_modality.get(kind, min([*by_modality.values(), setting["achieved_ratio"]]))


@dataclass(frozen=True)
class OneKind(Results):
    """Results whose questions are all about one modality, which counts as "images"."""

    def select(self, kind: str, families: Iterable[str] | None = None) -> list[int]:
        allowed = None if families is None else {*families}
        names = enumerate(self.answers.questions.families)
        return [i for i, name in names if kind != "videos" and (allowed is None or name in allowed)]


def as_results(stored: dict[str, Any], model: str, about: dict[str, Any]) -> OneKind:
    """Rows and answers of learned families (`benchmarks.real`), in the form that is ranked."""
    answers = PackedAnswers.from_json(stored["answers"])
    rows = {FULL: {"reducer": FULL, "run": 0}}
    correct = {FULL: answers.correct[FULL]}
    for row in stored["rows"]:
        if row["reducer"] != FULL:
            label = label_of(row["reducer"], f"{row['ratio']:g}", row["options"])
            rows[label] = {"reducer": row["reducer"], "ratio": row["ratio"], "run": 0}
            correct[label] = answers.correct[row["label"]]
    count, families = len(answers.questions), tuple(dict.fromkeys(answers.questions.families))
    known = {"model": model, "split": "validation", "items": count, "runs": [about]}
    return OneKind({**known, "settings": rows}, PackedAnswers(answers.questions, correct), families)


def learned_families(validation: dict[str, Any]) -> tuple[str, ...]:
    """Families on which the full model beats a blind guess by 25 points on the validation split.

    The blind guess is the model card's: the commonest answer or one of the options, whichever
    scores better. It is stored with the validation results. Below that there is little to lose, so
    retention says little. Families that the validation run left out count as not learned.

    Parameters
    ----------
    validation
        Of `read_sweep`.
    """
    answers = PackedAnswers.from_json(validation["answers"])
    learned = []
    for family in dict.fromkeys(answers.questions.families):
        pairs = zip(answers.questions.families, answers.correct[FULL], strict=True)
        scores = [score for name, score in pairs if name == family]
        if sum(scores) / len(scores) >= validation["blind"][family] + MARGIN:
            learned.append(family)
    return tuple(learned)


def collected(
    runs: dict[Setting, EvalRun], model: str, split: str, facts: dict[str, Any] | None = None
) -> Results:
    """Results of one sweep.

    Parameters
    ----------
    facts
        Provenance that replaces what the sweep recorded, see `benchmarks.publishing`.

    Raises
    ------
    OptionError
        A question was not answered.
    """
    answers = PackedAnswers.of({setting.label: run for setting, run in runs.items()}, FULL)
    first_run = next(iter(runs.values())).manifest
    known = {**first_run["identity"], **first_run}
    manifest = {
        "model": model,
        "split": split,
        "items": len(answers.questions),
        **({"blind": metrics(model)["blind"]} if split == "validation" else {}),
        "runs": [{**{k: known[k] for k in (*ENVIRONMENT, *IDENTITY)}, **(facts or {})}],
        "settings": {s.label: {**_cost(s, run), "run": 0} for s, run in runs.items()},
    }
    return Results(manifest, answers)


def add_lost(results: Results, lost: Mapping[str, Sequence[LostItem]]) -> None:
    """Note the items that were drawn, under the label of their setting."""
    for label, drawn in lost.items():
        results.settings[label]["lost"] = [asdict(item) for item in drawn]


def _cost(setting: Setting, run: EvalRun) -> dict[str, Any]:
    """The setting and its cost. No time: the vision tower ran for the first setting only."""
    work = {f"{kind}s": parts for kind, parts in run.manifest.get("work", {}).items()}
    ratios: dict[str, list[float]] = {}
    for r in run.answered:
        ratios.setdefault(kind_of(r["family"]), []).append(r["ratio"])
    return {
        "reducer": setting.reducer,
        "method": setting.method,
        "ratio": setting.ratio,
        "options": setting.written_options,
        **run.summary(),
        "achieved": {kind: sum(values) / len(values) for kind, values in ratios.items()},
        **({"work": work} if work else {}),
    }


def merged(old: Results, new: Results) -> Results:
    """Both; for settings that are in both the new answers count.

    Raises
    ------
    OptionError
        They are of other questions, or of another model.
    """
    if old.answers.questions != new.answers.questions or not _same_model(old, new):
        raise OptionError(
            f"the stored {old.manifest['split']} results of {old.manifest['model']} are of other "
            "items or other weights than this run, and the two cannot stand in one table. Give "
            "another folder with --out."
        )
    answers = old.answers.joined(new.answers)
    runs = [*old.manifest["runs"], *new.manifest["runs"]]
    latest = {k: {**setting, "run": len(runs) - 1} for k, setting in new.settings.items()}
    settings = {**old.settings, **latest}
    used = sorted({setting["run"] for setting in settings.values()})
    settings = {k: {**one, "run": used.index(one["run"])} for k, one in settings.items()}
    manifest = {**old.manifest, "runs": [runs[i] for i in used], "settings": settings}
    return Results(manifest, answers, old.learned)


def _same_model(old: Results, new: Results) -> bool:
    """By the hash of the weights; for old runs without it, by what the full model got right."""
    known = {run["weights"] for run in old.manifest["runs"] if "weights" in run}
    if known:
        return known == {run["weights"] for run in new.manifest["runs"]}
    return old.answers.correct[FULL] == new.answers.correct[FULL]


def read_all(results: Path, split: str = "test") -> list[Results]:
    """Results of every model in a folder, for pages: `averaged`."""
    return [
        Results.read(f.parent, split).averaged() for f in sorted(results.glob(f"*/{split}.json"))
    ]
