"""The packed form of runs: one bit per question and method in place of a folder of records.

Every paired statistic (retention intervals, McNemar tests) needs to know which questions a method
answered correctly, and nothing else about the answer texts. A second bit says whether the answer is
the one that the uncompressed model gave. Question ids are derived from the split, the families and
the index range where the question set has that form.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import publishing
from benchmarks.publishing import write
from tokencomp.errors import OptionError
from tokencomp.evaluation.runs import EvalRun

BY_FAMILY, ALTERNATING = "by family", "alternating"


def pack(bits: Sequence[int]) -> str:
    """Write 0/1 values as base64 text, eight to a byte, the first value in the highest bit."""
    return base64.b64encode(np.packbits(np.asarray(bits, dtype=bool)).tobytes()).decode()


def unpack(text: str, count: int) -> list[int]:
    """The first `count` bits of what `pack` wrote.

    Raises
    ------
    ValueError
        The text holds another number of bytes than `count` bits need.
    """
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{8 * len(packed)} packed bits for {count} questions.")
    return np.unpackbits(packed, count=count).tolist()


@dataclass(frozen=True)
class Questions:
    """The questions of a run, in order.

    Attributes
    ----------
    ids, families, answers
        Per question: its id, its question family, its reference answer.
    digest
        Hash of ids, prompts and reference answers: tells question sets apart whose ids are equal.
    """

    ids: tuple[str, ...]
    families: tuple[str, ...]
    answers: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> Questions:
        """Questions of records with `id`, `family`, `answer` and, if known, `prompt`."""
        rows = [(r["id"], r["family"], r["answer"], r.get("prompt", "")) for r in records]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        ids, families, answers, _ = zip(*rows, strict=True) if rows else ((), (), (), ())
        return cls(ids, families, answers, digest)

    def __len__(self) -> int:
        return len(self.ids)

    def to_json(self) -> dict[str, Any]:
        """Plain types, with ids as a range where they have that form."""
        named = self._ranges() or {"ids": list(self.ids), "families": list(self.families)}
        words = all(answer and " " not in answer for answer in self.answers)
        answers = " ".join(self.answers) if words else list(self.answers)
        return {**named, "answers": answers, "digest": self.digest}

    def _ranges(self) -> dict[str, Any] | None:
        """Split, families, first index, count and order from which `ids` follow, else None."""
        parts = self.ids[0].rsplit("-", 2) if self.ids else []
        if len(parts) != 3 or not parts[2].isdigit():
            return None
        families = list(dict.fromkeys(self.families))
        ranges = {
            "split": parts[0],
            "families": families,
            "start": int(parts[2]),
            "per_family": len(self.ids) // len(families),
        }
        for order in (BY_FAMILY, ALTERNATING):
            if _derived({**ranges, "order": order}) == (self.ids, self.families):
                return {**ranges, "order": order}
        return None

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Questions:
        if "ids" in stored:
            ids, families = tuple(stored["ids"]), tuple(stored["families"])
        else:
            ids, families = _derived(stored)
        answers = stored["answers"]
        words = answers.split() if isinstance(answers, str) else answers
        return cls(ids, families, tuple(words), stored["digest"])


def _derived(ranges: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids and families of a question set in range form."""
    indices = range(ranges["start"], ranges["start"] + ranges["per_family"])
    if ranges["order"] == BY_FAMILY:
        pairs = [(family, i) for family in ranges["families"] for i in indices]
    else:
        pairs = [(family, i) for i in indices for family in ranges["families"]]
    ids = tuple(f"{ranges['split']}-{family}-{i:05d}" for family, i in pairs)
    return ids, tuple(family for family, _ in pairs)


@dataclass(frozen=True)
class PackedAnswers:
    """Which questions each method answered correctly.

    Attributes
    ----------
    questions
    correct
        By method label, 0 or 1 per question.
    agrees
        By method label, 1 where the answer text is the uncompressed model's.
    """

    questions: Questions
    correct: dict[str, list[int]] = field(default_factory=dict)
    agrees: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Mapping[str, EvalRun], reference: str | None) -> PackedAnswers:
        """Pack runs by their labels; the order of the questions is that of the first run.

        Parameters
        ----------
        reference
            Label of the uncompressed model; None: `agrees` stays empty.

        Raises
        ------
        OptionError
            A question was not answered.
        """
        for label, run in runs.items():
            for one in run.failed:
                raise OptionError(
                    f"{label}: {one['id']} was not answered ({one['error']}). Try again."
                )
        questions = Questions.of(next(iter(runs.values())).answered if runs else ())
        records = {label: {r["id"]: r for r in run.answered} for label, run in runs.items()}
        rows = {label: [by_id[name] for name in questions.ids] for label, by_id in records.items()}
        texts = {label: [r["prediction"] for r in some] for label, some in rows.items()}
        correct = {label: [int(r["correct"]) for r in some] for label, some in rows.items()}
        agrees = {
            label: [int(a == b) for a, b in zip(some, texts[reference], strict=True)]
            for label, some in texts.items()
            if reference is not None
        }
        return cls(questions, correct, agrees)

    def joined(self, later: PackedAnswers) -> PackedAnswers:
        """Both; of methods that are in both, the answers of `later` count.

        Raises
        ------
        OptionError
            They are answers to other questions.
        """
        if self.questions != later.questions:
            raise OptionError(
                f"answers to {len(self.questions)} and {len(later.questions)} questions cannot "
                "stand in one table, because the questions differ. Answer them again."
            )
        return PackedAnswers(
            self.questions,
            {**self.correct, **later.correct},
            {**self.agrees, **later.agrees},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "questions": self.questions.to_json(),
            "correct": {k: pack(bits) for k, bits in self.correct.items()},
            "agrees": {k: pack(bits) for k, bits in self.agrees.items()},
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PackedAnswers:
        questions = Questions.from_json(stored["questions"])
        count = len(questions)
        both = ({k: unpack(v, count) for k, v in stored[part].items()} for part in PARTS)
        return cls(questions, *both)


PARTS = ("correct", "agrees")


def read_sets(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries by the name of a question set, with `answers` unpacked."""
    return {
        name: {**entry, "answers": PackedAnswers.from_json(entry["answers"])}
        for name, entry in stored.items()
    }


def stored_sets(sets: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `read_sets` reads."""
    return {name: {**entry, "answers": entry["answers"].to_json()} for name, entry in sets.items()}


COSTS = ("achieved_ratio", "flops", "kv_bytes", "achieved")
COUNTED = ("items", "failed", "accuracy")  # of a setting: all are answered
USUAL = {"options": {}, "run": 0}  # of a setting, where it does not say


def write_sweep(path: Path, manifest: Mapping[str, Any], answers: Mapping[str, Any]) -> None:
    """Write a sweep; what follows from something else, or is equal, is written once.

    `shared` has the costs of settings and modalities, which these name by number. `answers` of a
    setting are its packed bits, from which it follows how many answers are right.

    Parameters
    ----------
    manifest
        See `Results`.
    answers
        `PackedAnswers.to_json()`.
    """
    shared: dict[str, int] = {}

    def number(value: Any) -> int:
        return shared.setdefault(json.dumps(value), len(shared))

    settings = {}
    for label, setting in manifest["settings"].items():
        kept = {k: v for k, v in setting.items() if k not in (*COSTS, *COUNTED)}
        kept = {k: v for k, v in kept.items() if k not in USUAL or v != USUAL[k]}
        if "work" in kept:
            kept["work"] = {kind: number(parts) for kind, parts in kept["work"].items()}
        kept["cost"] = number({k: setting[k] for k in COSTS if k in setting})
        settings[label] = {**kept, "answers": [answers[part][label] for part in PARTS]}
    content = {
        **manifest,
        "shared": [json.loads(text) for text in shared],
        "settings": settings,
        "questions": answers["questions"],
    }
    write(path, content)


def read_sweep(path: Path) -> dict[str, Any]:
    """The manifest of a sweep, with `answers` as `PackedAnswers.to_json` gives them."""
    stored = publishing.read(path)
    if "shared" not in stored:  # as older checkouts wrote them
        return stored
    shared, questions = stored.pop("shared"), stored.pop("questions")
    answers: dict[str, Any] = {"questions": questions, **{part: {} for part in PARTS}}
    for label, setting in stored["settings"].items():
        bits = dict(zip(PARTS, setting.pop("answers"), strict=True))
        for part, text in bits.items():
            answers[part][label] = text
        for name, value in USUAL.items():
            setting.setdefault(name, copy.copy(value))
        right = sum(unpack(bits["correct"], stored["items"]))
        setting |= {"items": stored["items"], "failed": 0, "accuracy": right / stored["items"]}
        setting |= shared[setting.pop("cost")]
        if "work" in setting:
            setting["work"] = {kind: shared[i] for kind, i in setting["work"].items()}
    return {**stored, "answers": answers}
