"""Tables, and cells of tables, that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokencomp.evaluation.metrics import Difference, Retention

COLUMNS = 6
"""Settings whose scores fit into a terminal."""


def retained(retention: Retention | None) -> str:
    """Retention with its interval, e.g. "97.1% [94%, 99%]"; a dash where there is none."""
    if retention is None or retention.value != retention.value:
        return "–"
    return f"{retention.value:.1%} [{retention.low:.0%}, {retention.high:.0%}]"


def table(*names: str, gap: int = 2, title: str | None = None, **column: Any) -> Any:
    """A table without lines, whose columns do not wrap unless `column` says how they do."""
    from rich.table import Table

    shown = Table(box=None, padding=(0, gap, 0, 0), title=title, title_justify="left")
    shown.caption_justify = "left"
    for name in names:
        shown.add_column(name, **(column or {"no_wrap": True}))
    return shown


def print_lines(console: Any, lines: Sequence[Any]) -> None:
    """The table of a report's lines, then their comparisons with the baselines."""
    shown = table("method", "ratio", "reached", "items", "accuracy", "retention")
    for line in lines:
        failed = len(line.run.failed)
        shown.add_row(
            line.label,
            f"{line.run.shown_ratio}",
            f"{line.run.mean('ratio'):.3f}" if line.run.answered else "–",
            f"{len(line.run.answered)}" + (f" ({failed} failed)" if failed else ""),
            f"{line.accuracy:.1%}" if line.run.answered else "–",
            retained(line.retention),
        )
    console.print(shown)
    if len(lines) > 1:
        _print_rivals(console, lines[1:])
    _print_work(console, lines)
    _print_scores(console, lines)
    for line in lines:
        if line.moved:
            console.print(f"† {line.run.label} at {line.run.shown_ratio} {line.moved}.")


def _print_rivals(console: Any, lines: Sequence[Any]) -> None:
    seeds = max(line.rivals.seeds for line in lines)
    title = "\nDifferences in points, 95 % intervals"
    title += f"; random: mean of {seeds} seeds" if seeds else ""
    names = ("method", "ratio", "vs full", "vs random", "vs downscale", "its failures", "as full")
    shown = table(*names, gap=1, title=title)
    for line in lines:
        rivals = line.rivals
        shown.add_row(
            line.label,
            f"{line.run.shown_ratio}",
            *(_points(d) for d in (rivals.full, rivals.random, rivals.downscale)),
            "–" if rivals.detail is None else f"{rivals.detail:.0%}\nof {rivals.detail_items}",
            "–" if rivals.agreement is None else f"{rivals.agreement:.0%}",
        )
    shown.caption = (
        "its failures: accuracy on the items that downscaling gets wrong. as full: the same answer "
        "as the full model, right or wrong."
    )
    console.print(shown)


def _print_work(console: Any, lines: Sequence[Any]) -> None:
    """Where the work of the first image and of the first video goes."""
    from tokencomp.evaluation.cost import PARTS
    from tokencomp.pages.report import work_tables

    titles = {"decode": "decode/token", "kv_bytes": "KV bytes"}
    for kind, rows in work_tables(lines).items():
        title = f"\nWork of the first {kind}: the full model's, and shares of it"
        names = (titles.get(name, name) for name in PARTS)
        shown = table("method", "ratio", *names, gap=1, title=title)
        for line, cells in rows:
            shown.add_row(line.label, f"{line.run.shown_ratio}", *cells)
        shown.caption = "FLOPs; reduce: the method's own work as a share of the full prefill."
        console.print(shown)


def _print_scores(console: Any, lines: Sequence[Any]) -> None:
    """lmms-eval's own scores, if they fit beside each other; the page has those of all settings."""
    from tokencomp.pages.report import score_rows

    rows = score_rows(lines) if len(lines) <= COLUMNS else []
    if rows:
        shown = table("task", title="\nlmms-eval's scores", overflow="fold")
        for line in lines:
            ratio = f"\n{line.run.shown_ratio}" if line.run.ratio else ""
            shown.add_column(line.label + ratio, justify="right")
        for name, cells in rows:
            shown.add_row(name, *cells)
        console.print(shown)


def _points(difference: Difference | None) -> str:
    """The difference, and its interval on a line of its own: a terminal has 80 columns."""
    if difference is None:
        return "–"
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.1f}\n[{low:+.0f}, {high:+.0f}]"
