"""Stored results with the names of today: results keep the names under which they were measured.

`RENAMED` has every name that has changed since. Readers of results apply it, so that pages print
names that `patch` takes; the files themselves are not edited.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RENAMED = {
    "kcentre": "kcenter",
    "k-centre": "k-center",
    "merge": "bipartite",  # the reducer
    "KCentre(thumb=": "KCenter(pool=",
    "contrast=": "std_weight=",
    "change=": "temporal_weight=",
    "Merge(": "Bipartite(",
    "moved": "deviation",
}
"""Names of reducers and of what else results hold, as stored and as they are called now."""
OPTION = "rest", "merge"
"""The option of `patch` that says what becomes of tokens that are not kept, before and now."""
VALUES: dict[str, bool | str] = {"drop": False, "merge": True, "auto": "auto"}
"""Its values, as stored and as they are now."""
NOTE = (
    'The stored results name `kcenter` "kcentre", `bipartite` "merge", and `merge=False`, '
    '`merge=True` "rest=drop", "rest=merge" (`benchmarks/stored.py`).'
)
"""What pages say about it."""

_WORDS = re.compile(
    r"\bk-?centre\b|KCentre\(thumb=|\bcontrast=|\bchange=|\bMerge\(|^moved$"
    r"|^merge(?=$|[@+]|-\d| at \d)"  # alone, or at the head of a label
)
_VALUE = re.compile(r"\brest=(drop|merge|auto)\b")


def today(value: Any) -> Any:
    """A value from a file of results, with the names of today. Commands stay as they were run."""
    if isinstance(value, dict):
        return dict(_entry(key, one) for key, one in value.items())
    if isinstance(value, list):
        return [today(one) for one in value]
    return _text(value) if isinstance(value, str) else value


def loads(text: str) -> Any:
    """JSON of results, with the names of today."""
    return today(json.loads(text))


def read_stored(path: Path) -> Any:
    """A JSON file of results, with the names of today."""
    return loads(path.read_text(encoding="utf-8"))


def _entry(key: str, value: Any) -> tuple[str, Any]:
    if key == "command":
        return key, value
    if key == OPTION[0] and value in (*VALUES,):
        return OPTION[1], VALUES[value]
    if key == OPTION[1] and (value in (None, "auto") or isinstance(value, bool)):
        return (
            key,
            value,
        )  # the option in a newer file, not the reducer of that name in an older one
    return _text(key), today(value)


def _text(text: str) -> str:
    renamed = _WORDS.sub(lambda match: RENAMED[match.group()], text)
    if not _VALUE.search(renamed):
        return renamed
    renamed = _VALUE.sub(lambda match: f"{OPTION[1]}={VALUES[match.group(1)]}", renamed)
    # The options of a label stand in the order of their names, which has changed.
    label, at, ratio = renamed.partition(" at ")
    mark = " " if " " in label else "-"
    head, *options = re.split(rf"{mark}(?=[a-z_.]+=)", label)
    return mark.join([head, *sorted(options)]) + at + ratio
