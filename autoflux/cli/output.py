"""How every command speaks: results on stdout, talk on stderr, `--json` as one envelope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from autoflux.errors import ErrorReport, OutputUnwritable

SCHEMA = 1
"""Version of the envelope."""


MIN_COLUMNS = 40
"""What is printed is not squeezed further: the terminal breaks its lines, and nothing is lost."""

UNKNOWN_COLUMNS = 80
"""For COLUMNS=0, which is how some terminals say that they do not know."""

UNBROKEN_COLUMNS = 10_000
"""Longer than any path."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1; `run` knows better

    @property  # type: ignore[misc] # nobody here sets it
    def size(self) -> ConsoleDimensions:
        found = super().size
        columns = found.width or UNKNOWN_COLUMNS
        return ConsoleDimensions(max(columns, MIN_COLUMNS), found.height)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich prints, but text is no markup unless `markup=True` says so: names and paths may have brackets.

        Raises:
            OutputUnwritable: standard output takes no more, such as a full disk.
        """
        try:
            super().print(*objects, **{"markup": False, **options})
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _unwritable(error) from error


class _Unbroken:
    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._table, options.update(width=UNBROKEN_COLUMNS))


stdout = _Console(highlight=False, emoji=False)
stderr = _Console(stderr=True, highlight=False, emoji=False)

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """Add `--json`, passed to the command as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def succeed(data: object) -> None:
    """Print the envelope of a success."""
    _print({"schema": SCHEMA, "ok": True, "data": data, "error": None})


def fail(report: ErrorReport, data: object = None) -> None:
    """Print the envelope of a failure, with what was found out all the same."""
    _print({"schema": SCHEMA, "ok": False, "data": data, "error": report})


def complain(report: ErrorReport) -> None:
    """Print an error for people."""
    stderr.print(Text.assemble(("error:", "bold red"), f" {report.message}"), soft_wrap=True)
    if report.hint:
        hint(report.hint)


def hint(text: str) -> None:
    """Print for people what to try."""
    stderr.print(Text.assemble(("try:", "bold"), f"   {text}"), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning for people."""
    stderr.print(Text.assemble(("warning:", "bold yellow"), f" {message}"), soft_wrap=True)


def print_whole(table: Table) -> None:
    """Print a table on stdout, and break no line of it for a program that reads it."""
    if stdout.is_terminal:
        stdout.print(table)
    else:
        stdout.print(_Unbroken(table), crop=False)


def _print(envelope: dict[str, object]) -> None:
    try:
        click.echo(msgspec.json.format(msgspec.json.encode(envelope), indent=2).decode())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> OutputUnwritable:
    return OutputUnwritable(f"cannot write to standard output: {error.strerror}")
