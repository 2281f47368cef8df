"""Self-contained HTML pages from the templates in this folder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokencomp.storage import writing


def render(template: str, path: str | Path, **values: Any) -> Path:
    """Fill a template and write it to `path`. Text is escaped; SVG is marked as safe there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from tokencomp.pages.pictures import data_uri  # needs Pillow, `si` does not

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(si=si, pct=percent, runs=compact, jpeg=data_uri)
    path = Path(path)
    with writing(path):
        path.write_text(environment.get_template(template).render(**values), encoding="utf-8")
    return path


def percent(value: float, digits: int = 1) -> str:
    """Percent, e.g. "97.1 %"; a dash for NaN."""
    return "–" if value != value else f"{100 * value:.{digits}f} %"


def compact(per_layer: Sequence[int]) -> str:
    """Tokens per layer in words: [64, 64, 64, 32] → "64 in 3 layers, 32 in 1 layer"."""
    parts = []
    for value, group in itertools.groupby(per_layer):
        n = sum(1 for _ in group)
        parts.append(f"{value} in {n} layer{'s' * (n > 1)}")
    return ", ".join(parts)


def si(value: float, unit: str = "") -> str:
    """A number with an SI prefix: 1.2 M, 35 k."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()
