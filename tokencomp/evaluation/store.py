"""A run on disk: one JSON line per item, and a manifest. Safe to kill at any point."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError

MANIFEST, RECORDS = "manifest.json", "records.jsonl"


class RunFolder:
    """Where the results of one setting live.

    Parameters
    ----------
    path
        Folder, made when missing. It may hold an unfinished run of the same setting.
    identity
        What must be equal for old records to count (model, setting, frames, ...).
    rank
        Process number under `accelerate launch`; every process writes a file of its own.

    Raises
    ------
    OptionError
        The folder holds a run with another identity.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any], rank: int = 0) -> None:
        self.path, self.identity, self.rank = Path(path), identity, rank
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"cannot write results to {path}: {error}. Give another folder."
            ) from error
        name = RECORDS if rank == 0 else f"records.{rank}.jsonl"
        self.file = self.path / name
        self._check()
        _drop_partial_line(self.file)

    def _check(self) -> None:
        manifest = self.path / MANIFEST
        if not manifest.exists():
            return
        old = read_json(manifest).get("identity", {})
        plain = json.loads(json.dumps(self.identity, default=str))
        changed = sorted(k for k in {*old, *plain} if old.get(k) != plain.get(k))
        if changed:
            told = ", ".join(f"{k}: {old.get(k)!r} there, {plain.get(k)!r} now" for k in changed)
            raise OptionError(
                f"{self.path} holds a run that differs in {told}. Give another output folder, or "
                "remove this one."
            )

    def done(self) -> set[str]:
        """Ids that need not be asked again. Failed items are tried once more."""
        return {r["id"] for r in read_records(self.path) if not r.get("error")}

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records and hand them to the operating system at once."""
        lines = "".join(json.dumps(r) + "\n" for r in records)
        with self.file.open("a") as file:
            file.write(lines)

    def write_manifest(self, extra: dict[str, Any]) -> None:
        """Write identity and `extra`; a reader never sees half a file."""
        text = json.dumps({"identity": self.identity, **extra}, indent=2, default=str) + "\n"
        temporary = self.path / f".{MANIFEST}.{self.rank}"
        temporary.write_text(text)
        temporary.replace(self.path / MANIFEST)


def _drop_partial_line(file: Path) -> None:
    """Cut off what a killed process left of its last line."""
    if not file.exists():
        return
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with file.open("r+b") as handle:
            handle.truncate(whole)


def read_json(path: Path) -> dict[str, Any]:
    """A manifest. Raises `OptionError` if it cannot be read or is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: not a readable manifest ({error}).") from error
    if not isinstance(found, dict):
        raise OptionError(f"{path}: not a manifest, which is a JSON object.")
    return found


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a run folder, in the order in which ids first appear.

    Of an item's records the first without an error counts, else the last. A half-written last
    line is left out.

    Raises
    ------
    OptionError
        A file is no text, or a record is no object with an id.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(path).glob("records*.jsonl")):
        for number, line in enumerate(_lines(file), 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(record, dict) or "id" not in record:
                raise OptionError(f"{file}, line {number}: not a record, which has an id.")
            known = found.get(record["id"])
            if known is None or known.get("error"):
                found[record["id"]] = record
    return list(found.values())


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: not a readable records file ({error}).") from error
