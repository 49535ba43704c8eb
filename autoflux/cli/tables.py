"""Tables as all commands print them."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table


def table(*columns: str, title: str) -> Table:
    """An empty table with these columns; its cells are text, not markup."""
    made = _Escaped(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        made.add_column(column, overflow="fold", header_style="dim")
    return made


class _Escaped(Table):
    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(escape(str(cell)) for cell in cells), **options)
