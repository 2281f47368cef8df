"""Answers on disk: one JSON line per item, and a manifest. Runs can be killed and resumed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.storage import check_identity, keeping, read_object, write_json, write_lines, writing

MANIFEST, RECORDS = "manifest.json", "records.jsonl"
ASKED = {"media": "pictures, clips or sounds", "prompt": "words", "answer": "right answer"}
"""Fields of a record that say what was asked, in words; media are a hash of their files."""


class AnswerStore:
    """A folder of records, each with an `id`, and the manifest of the run that wrote them.

    It may contain an unfinished run of the same identity, which is all that answers depend on.
    Every process (`rank` under `accelerate launch`) writes a separate file. `question` returns what
    is asked under an id (`ASKED`, "" if unknown); answers to other questions are refused.
    """

    def __init__(
        self,
        path: str | Path,
        identity: dict[str, Any],
        rank: int = 0,
        question: Callable[[str], Mapping[str, str]] = lambda name: {},
    ) -> None:
        self.path, self.identity, self.rank = Path(path), identity, rank
        self._question = question
        manifest = self.path / MANIFEST
        with writing(manifest):
            self.path.mkdir(parents=True, exist_ok=True)
        self.manifest = read_object(manifest) if manifest.exists() else {}
        self.file = self.path / (RECORDS if rank == 0 else f"records.{rank}.jsonl")
        _drop_partial_line(self.file)
        self._records: dict[str, dict[str, Any]] = {}
        self.refresh()
        if self.manifest and (self._records or self.manifest.get("finished")):
            fix = "Give another --output folder, or remove this one."
            check_identity(self.path, self.manifest.get("identity", {}), identity, fix)
        self._check_questions()

    def refresh(self) -> None:
        """Read the folder again, for records of other processes."""
        self._records.clear()
        _merge(self._records, read_records(self.path))

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record per item, in the order in which ids first appeared."""
        return list(self._records.values())

    def done(self) -> set[str]:
        """Ids of answered items. Failed items are retried."""
        return {r["id"] for r in self.records if not r.get("error")}

    def _check_questions(self) -> None:
        """Raise `OptionError` if a question has changed since it was answered."""
        for record in self.records:
            now = {} if record.get("error") else self._question(record["id"])
            for name, words in ASKED.items():
                if name in record and now.get(name, "") not in ("", record[name]):
                    raise OptionError(
                        f"{self.path}: the {words} of question {record['id']!r} are not those that "
                        "were asked there. Give another --output folder, or remove this one."
                    )

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and flush them; raises `OptionError` if the folder cannot be written."""
        records = list(records)
        for record in records:
            held = "" if record.get("error") else self._question(record["id"]).get("media", "")
            record |= {"media": held} if held else {}
        lines = "".join(json.dumps(r) + "\n" for r in records)
        with keeping(self.path), self.file.open("a") as file:
            file.write(lines)
        _merge(self._records, records)

    def write(
        self, manifest: dict[str, Any], records: Iterable[dict[str, Any]] | None = None
    ) -> None:
        """Write the manifest, and before it `records`, if any; each file atomically."""
        self.manifest = {**manifest, "identity": self.identity}
        with keeping(self.path):
            if records is not None:
                write_lines(self.file, records)
            write_json(self.path / MANIFEST, self.manifest)


def _merge(known: dict[str, dict[str, Any]], records: Iterable[dict[str, Any]]) -> None:
    """Of the records of an item keep the first without an error, else the last."""
    for record in records:
        if known.get(record["id"], {"error": "not asked"}).get("error"):
            known[record["id"]] = record


def _drop_partial_line(file: Path) -> None:
    """Truncate an unfinished last line of a killed process."""
    if not file.exists():
        return
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(file, whole)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All whole records of a run folder: per id the first without an error, or the last."""
    known: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(path).glob("records*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                _merge(known, [json.loads(line)])
    return list(known.values())
