"""Long answers: what is asked under which settings, how it is stored, and what an answer keeps.

Every text is written once, and all of them are compressed together.
"""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import run
from benchmarks.publishing import environment, write
from tokencomp.evaluation.metrics import Retention, retention
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import (
    DOWNSCALE,
    FEWER_FRAMES,
    FULL,
    MERGE,
    RANDOM,
    UNIFORM,
    Setting,
)
from tokencomp.zoo.shapesqa.examples import long_examples
from tokencomp.zoo.shapesqa.facts import Comparison, compare, read
from tokencomp.zoo.shapesqa.long_scenes import LongItem, item

MIDDLE = 0.75
RATIOS = (0.5, MIDDLE, 0.9)
CHOICE_RATIOS = (*RATIOS, 0.95)
"""Those of the rule that chooses the default (docs/decisions/0001), asked on validation."""
IMAGE_FAMILIES = ("describe", "count", "read", "compare")
CLIP_FAMILIES = ("follow",)
KINDS = {"images": IMAGE_FAMILIES, "clips": CLIP_FAMILIES}
DEFAULT = "auto"
QUESTION = ("condiv", "cdpruner", "mmtok", "anchorprune", "fastv", "pyramiddrop", "sparsevlm")
"""Reducers whose choice depends on the question."""
COVERING = ("kcenter", "divprune", "scope", "vidcom2", "bipartite")
"""Those that spread over the picture, whatever is asked."""
MERGED = ("kcenter", "condiv")
"""Those asked with `merge=True` as well."""
STEPS = ("kcenter", {"step_weight": 4.0, MERGE: True})
"""Asked about clips."""
ONCE = ("cdpruner", "mmtok", "anchorprune", "scope", "vidcom2", "bipartite", "flashvid")
"""Those asked at `MIDDLE` alone."""
BASELINES = (RANDOM, UNIFORM, DOWNSCALE)
CLIPS_ONLY = (FEWER_FRAMES, "flashvid")


def methods(kind: str, ratios: Sequence[float] = RATIOS) -> list[Setting]:
    """All settings for "images" or "clips", the full model first."""
    names = (DEFAULT, *QUESTION, *COVERING, "visionzip", *BASELINES)
    names += CLIPS_ONLY if kind == "clips" else ()
    each = [(name, OPTIONS.get(name, {})) for name in names]
    each += [(name, {MERGE: True}) for name in MERGED] + [(RANDOM, {"seed": 1})]
    each += [STEPS] if kind == "clips" else []
    asked = [
        Setting(name, ratio, options)
        for name, options in each
        for ratio in ((MIDDLE,) if name in ONCE else ratios)
    ]
    # A picture of another size replaces what the tower gave, so these come last.
    return [Setting(), *sorted(asked, key=lambda s: s.input_baseline)]


def method_of(label: str) -> str:
    """Name of the method in tables: the label of a setting without its ratio."""
    name, *rest = label.split("-")
    options = ", ".join(part for part in rest if not part.replace(".", "").isdigit())
    return f"{name} ({options})" if options else name


def group_name(method: str) -> str:
    """What a method reads, in words."""
    name = method.split(" ")[0]
    if name == DEFAULT:
        return "default"
    if name in (*BASELINES, FEWER_FRAMES):
        return "baseline"
    if name in QUESTION:
        return "question"
    return "covering" if name in COVERING else "tower"


LINE = 380
"""Characters of a line of packed text."""


def path_of(folder: Path, split: str, kind: str) -> Path:
    """The file of answers about one kind of media."""
    return folder / f"{'' if split == 'test' else split + '-'}{kind}.json"


def pack(value: Any) -> list[str]:
    """JSON, compressed, as lines of base64."""
    data = lzma.compress(json.dumps(value, separators=(",", ":")).encode(), preset=9)
    text = base64.b64encode(data).decode()
    return [text[k : k + LINE] for k in range(0, len(text), LINE)]


def unpack(lines: Sequence[str]) -> Any:
    return json.loads(lzma.decompress(base64.b64decode("".join(lines))))


@dataclass
class Answers:
    """Answers to one split.

    Attributes
    ----------
    about
        Provenance, by run.
    ids
        Items, in order, by kind of media.
    texts
        By kind and label of a setting: one answer per item.
    reached
        By kind and label: share of visual tokens that were removed.
    """

    about: list[dict[str, Any]] = field(default_factory=list)
    ids: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    reached: dict[str, dict[str, float]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        known: dict[str, int] = {}
        numbers = {
            kind: {
                label: [known.setdefault(text, len(known)) for text in texts]
                for label, texts in by_label.items()
            }
            for kind, by_label in self.texts.items()
        }
        packed = pack({"texts": list(known), "answers": numbers})
        about = {"about": self.about, "ids": self.ids, "reached": self.reached}
        write(path, {**about, "packed": packed})

    @classmethod
    def read(cls, path: Path) -> Answers:
        stored = json.loads(path.read_text())
        held = unpack(stored["packed"])
        texts = {
            kind: {label: [held["texts"][n] for n in some] for label, some in by_label.items()}
            for kind, by_label in held["answers"].items()
        }
        return cls(stored["about"], stored["ids"], texts, stored["reached"])

    @classmethod
    def of(cls, folder: Path, split: str) -> Answers:
        """The stored answers of a split about all kinds of media."""
        both = cls()
        for kind in KINDS:
            one = cls.read(path_of(folder, split, kind))
            both.about += one.about
            both.ids |= one.ids
            both.texts |= one.texts
            both.reached |= one.reached
        return both

    def add(
        self,
        kind: str,
        ids: Sequence[str],
        texts: Mapping[str, list[str]],
        reached: Mapping[str, float],
        facts: dict[str, Any],
    ) -> None:
        """Add what some settings have answered; later answers replace earlier ones.

        Raises
        ------
        ValueError
            They are answers to other items.
        """
        if self.ids.setdefault(kind, list(ids)) != list(ids):
            raise ValueError(f"the stored answers to {kind} are of other items; use another file")
        self.texts.setdefault(kind, {}).update(texts)
        self.reached.setdefault(kind, {}).update(reached)
        self.about.append({"kind": kind, "settings": len(texts), **facts})


LONGEST = 224
"""Tokens of an answer; the longest of a reference has about 200."""


def items_of(kind: str, split: str, per_family: int) -> list[LongItem]:
    """Items of a kind of media, family by family."""
    return [item(split, family, k) for family in KINDS[kind] for k in range(per_family)]


def ask(
    model: Any,
    processor: Any,
    items: Sequence[LongItem],
    settings: Sequence[Setting],
    folder: Path,
    batch: int,
) -> dict[Setting, EvalRun]:
    """Answers under every setting that the model takes; stopped runs go on."""
    settings, refused = run.usable(model, settings)
    for label, why in refused.items():
        print(f"not asked: {label}: {why}", flush=True)
    how: dict[str, Any] = {"batch_size": batch, "max_new_tokens": LONGEST}
    return run.ask(model, processor, long_examples(items), settings, folder, **how)


def add_answers(
    stored: Answers,
    loaded: tuple[Any, Any],
    kind: str,
    items: Sequence[LongItem],
    folder: Path,
    batch: int,
    facts: dict[str, Any],
    only: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
) -> None:
    """Ask all settings of a kind of media, or those of some methods, and add the answers."""
    wanted = [s for s in methods(kind, ratios) if not only or s.off or s.reducer in only]
    runs = ask(*loaded, items, wanted, folder, batch)
    ids = [one.id for one in items]
    texts, reached = {}, {}
    for setting, done in runs.items():
        said = {record["id"]: record["prediction"] for record in done.answered}
        texts[setting.label] = [said[name] for name in ids]
        reached[setting.label] = round(float(done.summary().get("achieved_ratio", 0.0)), 4)
    stored.add(kind, ids, texts, reached, {**environment(), **facts})


Where = Callable[[int, int], bool]
"""Which facts count, by their place in the answer, from 1, and the number of its facts."""
PLACES = ((1, 1), (2, 2), (3, 4), (5, 6), (7, 9), (10, 40))
"""First and last place of a fact in its answer."""
LENGTHS = ((1, 3), (4, 6), (7, 9), (10, 40))
"""Facts of an answer."""


def item_of(name: str) -> LongItem:
    """The item of an id."""
    split, family, index = name.split("-")
    return item(split, family, int(index))


def methods_of(answers: Answers, kind: str) -> dict[str, dict[float, list[str]]]:
    """By method and ratio: the labels of its settings, which are several for `random`."""
    found: dict[str, dict[float, list[str]]] = {}
    for label in answers.texts[kind]:
        if label == FULL:
            continue
        ratio = next(r for r in RATIOS if str(r) in label.split("-"))
        method = RANDOM if label.startswith(f"{RANDOM}-") else method_of(label)
        found.setdefault(method, {}).setdefault(ratio, []).append(label)
    return found


@dataclass(frozen=True)
class Group:
    """The items of some families with the answers of all settings."""

    items: tuple[LongItem, ...]
    texts: dict[str, list[str]]

    @classmethod
    def of(cls, answers: Answers, kind: str, families: Sequence[str] = ()) -> Group:
        items = [item_of(name) for name in answers.ids[kind]]
        wanted = [i for i, one in enumerate(items) if one.family in (families or KINDS[kind])]
        chosen = {label: [some[i] for i in wanted] for label, some in answers.texts[kind].items()}
        return cls(tuple(items[i] for i in wanted), chosen)

    @cached_property
    def _compared(self) -> dict[str, list[Comparison]]:
        return {}

    def compared(self, label: str) -> list[Comparison]:
        """Answers of a setting against the facts of the scenes."""
        if label not in self._compared:
            self._compared[label] = [
                compare(one.family, one.facts, read(one.family, text))
                for one, text in zip(self.items, self.texts[label], strict=True)
            ]
        return self._compared[label]

    def kept(self, labels: Sequence[str], where: Where) -> np.ndarray:
        """Share of its facts that every item keeps, mean over `labels`, float (items,).

        Items without a fact at `where` are left out.
        """
        rows = []
        for label in labels:
            held = [
                [k for p, k in enumerate(one.kept, 1) if where(p, len(one.kept))]
                for one in self.compared(label)
            ]
            rows.append([float(np.mean(some)) for some in held if some])
        return np.mean(rows, 0)

    def total(self, where: Where) -> int:
        """Number of facts."""
        return sum(
            where(p, len(one.facts)) for one in self.items for p in range(1, len(one.facts) + 1)
        )

    def retention(
        self, labels: Sequence[str], where: Where = lambda place, facts: True
    ) -> Retention:
        """Mean share of facts, divided by the full model's, with a paired interval over items."""
        full = self.kept([FULL], where)
        return retention(self.kept(labels, where), full)

    def shares(self, labels: Sequence[str]) -> dict[str, float]:
        """Shares of all facts that are right, changed, left out and invented; pairs in order."""
        found = [one for label in labels for one in self.compared(label)]
        facts = sum(len(one.kept) for one in found)
        pairs = sum(len(one.ordered) for one in found)
        return {
            "right": sum(sum(one.kept) for one in found) / facts,
            "changed": sum(sum(one.changed) for one in found) / facts,
            "left_out": sum(sum(one.left_out) for one in found) / facts,
            "invented": sum(one.invented for one in found) / facts,
            "ordered": sum(sum(one.ordered) for one in found) / max(1, pairs),
        }


def by_place(first: int, last: int) -> Where:
    """Facts at these places of their answer."""
    return lambda place, facts: first <= place <= last


def by_length(first: int, last: int) -> Where:
    """Facts of answers of so many facts."""
    return lambda place, facts: first <= facts <= last


OPTIONS = {"scope": {"saliency": "none"}}
