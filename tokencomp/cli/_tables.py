"""Tables and table cells that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokencomp.evaluation.metrics import Difference, Retention

COLUMNS = 6
"""Settings whose scores are printed next to each other; the page of a report has all."""
MOST = 10_000
"""Characters that no table needs in a line."""
NAMES = ("method", "ratio")
"""Columns that wrap where a caller does not name others."""


def retained(retention: Retention | None) -> str:
    """Retention with its interval, e.g. "97.1% [94%, 99%]"; a dash without one."""
    if retention is None or retention.value != retention.value:
        return "–"
    return f"{retention.value:.1%} [{retention.low:.0%}, {retention.high:.0%}]"


def print_table(
    console: Any,
    names: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    wrapped: Sequence[str] = NAMES,
    gap: int = 2,
    title: str | None = None,
    caption: str = "",
    justify: Any = "left",
) -> None:
    """Print a table; `wrapped` columns break between words, and numbers are never truncated."""
    from rich.measure import Measurement
    from rich.table import Table

    shown = Table(box=None, padding=(0, gap, 0, 0), title=title, title_justify="left")
    for name in names:
        wraps = name in wrapped
        side: Any = "left" if wraps else justify
        shown.add_column(name, no_wrap=not wraps, overflow="fold", justify=side)
    for row in rows:
        shown.add_row(*row)
    unbounded = console.options.update(max_width=MOST)
    needed = Measurement.get(console, unbounded, shown).minimum
    console.print(shown, width=max(needed, console.width), crop=False, soft_wrap=False)
    if caption:
        console.print(f"[dim italic]{caption}[/]")


def _named(line: Any) -> tuple[str, str]:
    """Method and ratio of a line; ratios by modality may wrap after commas."""
    return line.label, line.run.shown_ratio.replace(",", ", ")


def print_lines(console: Any, lines: Sequence[Any]) -> None:
    """The table of a report's lines, then their comparisons with the baselines."""
    rows = []
    for line in lines:
        failed, answered = len(line.run.failed), len(line.run.answered)
        reached = f"{line.run.mean('ratio'):.3f}" if answered else "–"
        items = f"{answered}" + (f"\n({failed} failed)" if failed else "")
        accuracy = f"{line.accuracy:.1%}" if answered else "–"
        work = f"{line.flops:.0%}" if answered else "–"
        rows.append((*_named(line), reached, work, items, accuracy, retained(line.retention)))
    print_table(console, (*NAMES, "reached", "FLOPs", "items", "accuracy", "retention"), rows)
    if len(lines) > 1:
        _print_rivals(console, lines[1:])
    _print_facts(console, lines)
    _print_scores(console, lines)
    for line in lines:
        if len(set(line.seeds or ())) > 1:
            low, high = (f"{100 * value:.0f}" for value in line.seeds)
            console.print(
                f"{line.label} at {line.run.shown_ratio}: accuracies of {low} to {high} %."
            )
        if line.deviation:
            console.print(f"† {line.run.label} at {line.run.shown_ratio} {line.deviation}.")


def _print_rivals(console: Any, lines: Sequence[Any]) -> None:
    seeds = max(line.comparisons.seeds for line in lines)
    title = "\nDifferences in points, 95 % intervals"
    title += f"; random: mean of {seeds} seeds" if seeds else ""
    names = (*NAMES, "vs full", "vs random", "vs downscale", "its failures", "as full")
    rows = [
        (
            *_named(line),
            *map(_points, (c.full, c.random, c.downscale)),
            "–" if c.detail is None else f"{c.detail:.0%}\nof {c.detail_items}",
            "–" if c.agreement is None else f"{c.agreement:.0%}",
        )
        for line, c in ((line, line.comparisons) for line in lines)
    ]
    columns = [c for c in zip(names, *rows, strict=True) if c[0] in NAMES or {*c[1:]} != {"–"}]
    shown, *cells = zip(*columns, strict=True)
    meaning = {
        "its failures": "its failures: accuracy on the items that downscaling gets wrong.",
        "as full": "as full: the same answer as the full model, right or wrong.",
    }
    caption = " ".join(text for name, text in meaning.items() if name in shown)
    wrapped = (*NAMES, *meaning)  # 80 columns then hold "downscale" and "divprune" in a line
    print_table(console, shown, cells, wrapped=wrapped, gap=1, title=title, caption=caption)


def _print_facts(console: Any, lines: Sequence[Any]) -> None:
    """Facts of long answers by their place, if there are any."""
    from tokencomp.pages.report import places_of

    places = places_of(lines)
    shown = [(line, line.facts) for line in lines if line.facts is not None]
    if not places or not shown:
        return
    rows = [("facts", "", *(str(shown[0][1].facts[k]) for k in places), "", "")]
    for line, facts in shown:
        shares = ["–" if (v := facts.by_place[k]) != v else f"{v:.0%}" for k in places]
        rows.append((*_named(line), *shares, f"{facts.left_out:.0%}", f"{facts.invented:.1f}"))
    print_table(
        console,
        (*NAMES, *places.values(), "left out", "invented"),
        rows,
        gap=1,
        title="\nFacts by their place in the answer",
        caption="By place: right facts, divided by the full model's; of the full model, by all. "
        "Left out: of all facts. Invented: statements without any fact, per answer.",
    )


def _print_scores(console: Any, lines: Sequence[Any]) -> None:
    """Scores of lmms-eval, if they fit next to each other; the page has all settings."""
    from tokencomp.pages.report import score_rows

    rows = score_rows(lines) if len(lines) <= COLUMNS else []
    if rows:
        labels = [" ".join(_named(line)) if line.run.ratio else line.label for line in lines]
        print_table(
            console,
            ("task", *labels),
            [(name, *cells) for name, cells in rows],
            wrapped=("task",),
            title="\nlmms-eval's scores",
            justify="right",
        )


def _points(difference: Difference | None) -> str:
    """The difference, and its interval on another line, for terminals of 80 columns."""
    if difference is None:
        return "–"
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.1f}\n[{low:+.1f}, {high:+.1f}]"
