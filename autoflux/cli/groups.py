"""Commands with commands of their own, whose modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import click


class LazyGroup(click.Group):
    """A group whose commands are `command` in modules `autoflux.cli.GROUP_NAME`."""

    def __init__(self, name: str, subcommands: Sequence[str], *, help: str) -> None:  # noqa: A002 — click's word
        """`subcommands` are in the order of the help page."""
        super().__init__(name, help=help)
        self._subcommands = tuple(subcommands)

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(self._subcommands)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in self._subcommands:
            return None
        found: click.Command = importlib.import_module(f"autoflux.cli.{self.name}_{name}").command
        return found
