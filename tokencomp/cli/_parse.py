"""Parse the text of options: names, ratios, options of reducers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from tokencomp.errors import OptionError


def names(text: str) -> list[str]:
    """ "aim, prune" → ["aim", "prune"], duplicates removed."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise OptionError(f"{text!r}: expected one or more names separated by commas.")
    return parts


def methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """ "condiv(power=2),bipartite" → [("condiv", {"power": 2}), ("bipartite", {})], once each."""
    found: list[tuple[str, dict[str, Any]]] = []
    for part in names(text) if "(" not in text else re.split(r",(?![^(]*\))", text):
        match = re.fullmatch(r"\s*([^()\s]+)\s*(?:\(([^()]*)\))?\s*", part)
        if match is None:
            raise OptionError(
                f"--reducer {part.strip()!r}: expected NAME or NAME(OPTION=VALUE,...)."
            )
        method = (match[1], _options(match[1], match[2] or ""))
        found += [method] if method not in found else []
    return found


def one_method(text: str, command: str) -> tuple[str, dict[str, Any]]:
    """The reducer of a command that takes one, and its options."""
    found = methods(text)
    if len(found) != 1:
        raise OptionError(f"--reducer {text!r}: {command} takes one reducer, got {len(found)}.")
    return found[0]


def _options(reducer: str, text: str) -> dict[str, Any]:
    """ "weighted=false, layers=[8,16]" → {"weighted": False, "layers": [8, 16]}."""
    options: dict[str, Any] = {}
    for pair in re.split(r",(?![^\[]*\])", text) if text.strip() else ():
        name, mark, value = (part.strip() for part in pair.partition("="))
        if not mark or not name:
            raise OptionError(f"--reducer {reducer}(...): {pair.strip()!r} is no OPTION=VALUE.")
        if name in options:
            raise OptionError(f"--reducer {reducer}(...): {name} is set twice. Leave one out.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def ratios(text: str) -> list[float | dict[str, float]]:
    """ "0.5,0.75" → [0.5, 0.75]; "0.5;video=0.75" → [0.5, {"video": 0.75}]."""
    from tokencomp.plan.counts import parse_ratio

    settings: list[float | dict[str, float]] = []
    for part in text.split(";"):
        pieces = names(part)
        named = [piece for piece in pieces if "=" in piece]
        if named and len(named) < len(pieces):
            raise OptionError(
                f"--ratio {part.strip()!r}: numbers and modalities in one setting. Separate "
                "settings with a semicolon, e.g. --ratio '0.5;video=0.75,audio=0.5'."
            )
        own: list[float | dict[str, float]] = [_by_modality(named)] if named else []
        own += [parse_ratio(piece) for piece in pieces if piece not in named]
        settings += [ratio for i, ratio in enumerate(own) if ratio not in (*settings, *own[:i])]
    return settings


def budgets(text: str) -> list[int | dict[str, int]]:
    """ "512,prompt=4096" → [512, {"prompt": 4096}]."""
    from tokencomp.plan.counts import Budget

    found: list[int | dict[str, int]] = []
    for piece in names(text):
        name, mark, value = piece.rpartition("=")
        number: Any = int(value) if value.strip().isdecimal() else value
        found.append({name.strip(): number} if mark else number)
        Budget.of(found[-1])
    return found


def speedups(text: str) -> list[float]:
    """ "1.5,2" → [1.5, 2.0]."""
    from tokencomp.plan.speed import check_speedup

    found: list[float] = []
    for piece in names(text):
        number: Any = piece
        with contextlib.suppress(ValueError):
            number = float(piece)
        found.append(check_speedup(number))
    return found


def _by_modality(pairs: list[str]) -> dict[str, float]:
    """["video=0.75", "audio=0.5"] → {"video": 0.75, "audio": 0.5}."""
    from tokencomp.plan.counts import parse_ratio

    by_modality: dict[str, float] = {}
    for pair in pairs:
        kind, value = (side.strip() for side in pair.split("=", 1))
        if kind in by_modality:
            raise OptionError(
                f"--ratio gives {kind} twice in one setting. Separate settings with a semicolon, "
                f"e.g. --ratio '{kind}={by_modality[kind]:g};{pair}'."
            )
        by_modality[kind] = parse_ratio(value, f"ratio of {kind}")
    return by_modality


def numbers(chosen: Sequence[float | dict[str, float]], command: str) -> list[float]:
    """Ratios of a command that takes no ratios by modality; raise `OptionError` for those."""
    for ratio in chosen:
        if not isinstance(ratio, float):
            raise OptionError(
                f"--ratio {ratio}: {command} takes one number for all modalities. Ratios by "
                "modality work in demo, eval, inspect, profile and serve, and in tokencomp.patch."
            )
    return [ratio for ratio in chosen if isinstance(ratio, float)]


def one_ratio(text: str, command: str) -> float | dict[str, float]:
    """The ratio of a command that takes one; raise `OptionError` for several."""
    values = ratios(text)
    if len(values) != 1:
        raise OptionError(f"--ratio {text!r}: {command} takes one ratio, got {len(values)}.")
    return values[0]
