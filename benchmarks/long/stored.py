"""Stored answers: every text is written once, and all of them are compressed together."""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.long.settings import KINDS
from benchmarks.publishing import write

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
        write(path, {**_plain(self), "packed": packed})

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


def _plain(answers: Answers) -> dict[str, Any]:
    return {"about": answers.about, "ids": answers.ids, "reached": answers.reached}
