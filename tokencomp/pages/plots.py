"""Plots as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokencomp.evaluation.metrics import Retention

COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
GREYS = {
    "random": "#6b7280",
    "uniform": "#9ca3af",
    "downscale": "#111827",
    "fewer_frames": "#374151",
}


@dataclass(frozen=True)
class Point:
    """One setting: position, and the interval of y (None without one)."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def accuracy_point(x: float, accuracy: float, kept: Retention | None, full: float) -> Point:
    """A setting, with the interval of its retention scaled to accuracy; for `full` without it."""
    if kept is None or kept.value != kept.value:
        return Point(x, accuracy)
    return Point(x, accuracy, kept.low * full, min(kept.high * full, 1.0))


def lines(
    series: Mapping[str, Sequence[Point]], *, x: str, y: str, reference: float | None = None
) -> str:
    """One line per series, baselines dashed and grey; returns an `<svg>` element.

    If every series has one point, each gets a row instead. `x` and `y` are labels of the axes, and
    `reference` is the y of the full model.
    """
    if series and all(len(points) == 1 for points in series.values()):
        return _rows({name: points[0] for name, points in series.items()}, y, reference)
    figure, axes = _axes(3.5)
    for (name, points), color in zip(series.items(), _colors(series), strict=True):
        _draw_series(axes, name, points, color)
    if reference is not None:
        axes.axhline(reference, color="#111827", linewidth=1, zorder=1)
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("full model", (0.01, reference), xytext=(0, 3), fontsize=9, **place)
    _in_percent(axes.yaxis)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    if series:
        axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _rows(points: Mapping[str, Point], label: str, reference: float | None) -> str:
    """One row per name with its value and interval, the first on top."""
    figure, axes = _axes(max(2.0, 0.8 + 0.35 * len(points)))
    for row, (point, color) in enumerate(zip(points.values(), _colors(points), strict=True)):
        axes.plot([point.y], [row], "o", markersize=6, color=color, zorder=3)
        if point.low is not None and point.high is not None:
            axes.hlines(row, point.low, point.high, color=color, alpha=0.5)
    if reference is not None:
        axes.axvline(reference, color="#111827", linewidth=1, zorder=1)
        axes.annotate(
            "full model", (reference, 1), xycoords=("data", "axes fraction"), xytext=(-3, 3),
            textcoords="offset points", fontsize=9, ha="right",
        )  # fmt: skip
    axes.set_yticks(range(len(points)), list(points))
    axes.set_ylim(len(points) - 0.5, -0.5)
    _in_percent(axes.xaxis)
    axes.set_xlabel(label)
    axes.grid(alpha=0.25, axis="x")
    return _svg(figure)


def _axes(height: float) -> tuple[Any, Any]:
    """An empty plot that is legible on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _in_percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _colors(names: Collection[str]) -> list[str]:
    own = iter(COLORS * (1 + len(names) // len(COLORS)))
    return [GREYS.get(name) or next(own) for name in names]


def _draw_series(axes: Any, name: str, points: Sequence[Point], color: str) -> None:
    """Draw a line through the points, and their intervals as a band, or as error bars."""
    ordered = sorted(points, key=lambda p: p.x)
    xs, ys = [p.x for p in ordered], [p.y for p in ordered]
    form = "o--" if name in GREYS else "o-"
    axes.plot(xs, ys, form, markersize=5, linewidth=1.8, color=color, label=name, zorder=3)
    low, high = [p.low for p in ordered], [p.high for p in ordered]
    if None not in low and len(ordered) > 1:
        axes.fill_between(xs, low, high, color=color, alpha=0.08, linewidth=0)
    elif None not in low:
        axes.vlines(xs, low, high, color=color, alpha=0.4)


def _svg(figure: Any) -> str:
    """The `<svg>` element of a figure, without dates and random ids."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    # A fixed salt, else ids of clip paths are random; text as text, else letters are outlines.
    with rc_context({"svg.hashsalt": "tokencomp", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
