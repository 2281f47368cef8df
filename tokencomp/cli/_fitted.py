"""Tables that fit into a terminal: names wrap between words, numbers are never cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NAMES = ("method", "ratio")
"""Columns that wrap where a caller does not name others."""
LONGEST = 24
"""Longest word of a name that widens its column; longer ones, such as paths, break."""


@dataclass
class _Column:
    """A column with its cells as rich texts; `wraps` if its cells may have several lines."""

    name: Any
    cells: list[Any]
    wraps: bool

    @property
    def narrowest(self) -> int:
        """Width in which no number is cut and no word broken."""
        words = [self.name.plain, *(c.plain for c in self.cells if self.wraps)]
        longest = max((len(word) for text in words for word in text.split()), default=0)
        lines = [] if self.wraps else [_width(c) for c in self.cells]
        return max(min(longest, LONGEST) if self.wraps else longest, *lines, 0)

    @property
    def widest(self) -> int:
        return max(self.narrowest, *map(_width, [self.name, *self.cells]))


def _width(text: Any) -> int:
    return max(map(len, text.plain.splitlines()), default=0)


def print_fitted(
    console: Any,
    names: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    *,
    wrapped: Sequence[Any] = NAMES,
    least: Sequence[Any] = (),
    elsewhere: str = "",
    gap: int = 2,
    title: str | None = None,
    caption: str = "",
    justify: Any = "left",
) -> None:
    """Print a table in the width of the console.

    Cells are text, or rich texts. Columns of `wrapped` break between words. Where the others do not
    fit, columns of `least` are left out, the first of them first; a line below names them and says
    `elsewhere`, where they are.
    """
    from rich.table import Table

    columns = [
        _Column(_text(name), [_text(row[k]) for row in rows], name in wrapped)
        for k, name in enumerate(names)
    ]
    left_out: list[str] = []
    for name in least:
        if _spare(columns, gap, console.width) >= 0:
            break
        last = next(c for c in reversed(columns) if c.name.plain == str(name))
        columns = [c for c in columns if c is not last]
        left_out.append(" ".join(last.name.plain.split()))
    if left_out:
        caption += f"\nNot shown, too wide: {', '.join(left_out)}. {elsewhere}"
    shown = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, title=title)
    shown.title_justify = shown.caption_justify = "left"
    for column, width in zip(columns, _widths(columns, gap, console.width), strict=True):
        side: Any = "left" if column.wraps else justify
        shown.add_column(column.name, width=width, overflow="fold", justify=side)
    for cells in zip(*(c.cells for c in columns), strict=True):
        shown.add_row(*cells)
    console.print(shown)
    if caption:
        console.print(f"[dim italic]{caption.strip()}[/]")


def print_beside(
    console: Any,
    names: Sequence[str],
    columns: Sequence[Sequence[str]],
    *,
    wrapped: Sequence[str] = (),
    gap: int = 2,
    title: str = "",
) -> None:
    """Print columns side by side, in blocks as wide as the console that all begin with the first.

    `names` are those of the lines, the first of which is the head. The head and the lines of
    `wrapped` may break between words.
    """
    from rich.table import Table

    wraps = [k == 0 or name in wrapped for k, name in enumerate(names)]
    widths = [
        max(
            _Column(_text(""), [_text(cell)], w).narrowest for cell, w in zip(c, wraps, strict=True)
        )
        for c in columns
    ]
    head, rest = max(map(len, names)) + gap, [*range(1, len(columns))]
    while True:
        shown = [0]
        while rest and (
            len(shown) == 1
            or head + sum(widths[k] + gap for k in [*shown, rest[0]]) - gap <= console.width
        ):
            shown.append(rest.pop(0))
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, title=title)
        table.title_justify = "left"
        table.add_column("", width=head - gap)
        spare = console.width - head - sum(widths[k] + gap for k in shown) + gap
        for k in shown:
            more = max(min(spare, max(map(len, columns[k][1:])) - widths[k]), 0)
            spare -= more
            table.add_column(
                columns[k][0], width=widths[k] + more, justify="right", overflow="fold"
            )
        for line, name in enumerate(names[1:], 1):
            table.add_row(f"[bold]{name}[/]", *(_text(columns[k][line]) for k in shown))
        console.print(table)
        if not rest:
            return
        title = ""
        console.print()


def _text(cell: Any) -> Any:
    from rich.text import Text

    return Text(cell) if isinstance(cell, str) else cell


def _spare(columns: Sequence[_Column], gap: int, room: int) -> int:
    return room + gap - sum(c.narrowest + gap for c in columns)


def _widths(columns: Sequence[_Column], gap: int, room: int) -> list[int]:
    """What room there is goes to names first: the last of them is the shortest."""
    widths, spare = [c.narrowest for c in columns], max(_spare(columns, gap, room), 0)
    order = [k for k, c in enumerate(columns) if c.wraps][::-1]
    for k in [*order, *(k for k, c in enumerate(columns) if not c.wraps)]:
        more = min(spare, columns[k].widest - widths[k])
        widths[k] += more
        spare -= more
    return widths
