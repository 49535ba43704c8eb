"""Tables as all commands print them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

LONGEST_WORD = 24
"""A word up to this long is not broken; longer ones, such as paths, may be."""

SHORT_CELL = 10
"""A cell up to this long stays on one line: `1.22 MB`."""


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """An empty table with these columns, of which `right` stand at the right; its cells are text, not markup.

    A cell that is a rich `Text` keeps its style. Where the terminal is too narrow for whole words side by side, each
    row is printed as a paragraph: its first cell, and below it the others with their names.
    """
    made = _Fitting(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        made.add_column(column, overflow="fold", header_style="dim", justify="right" if column in right else "left")
    return made


class _Fitting(Table):
    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width(console, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._paragraphs()

    def _least_width(self, console: Console, options: ConsoleOptions) -> int:
        def least(cell: Any) -> int:
            words, whole = Measurement.get(console, options.update(width=1000), cell)
            return min(LONGEST_WORD, max(words, min(whole, SHORT_CELL)))

        columns = ([column.header, *column.cells] for column in self.columns)
        return sum(max(map(least, cells)) for cells in columns) + 2 * (len(self.columns) - 1)

    def _paragraphs(self) -> Iterator[Any]:
        if self.title:
            yield Text(str(self.title), style="bold")
        for first, *others in zip(*(column.cells for column in self.columns), strict=True):
            yield first
            named = zip((column.header for column in self.columns[1:]), others, strict=True)
            yield _paragraph([(str(name), cell) for name, cell in named if str(cell)])


def _paragraph(rows: list[tuple[str, Any]]) -> Table:
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, cell in rows:
        made.add_row(f"  {name}", cell)
    return made
