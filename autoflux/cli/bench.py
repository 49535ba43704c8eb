"""`autoflux bench`: measurements of this machine with this model."""

from __future__ import annotations

import importlib

import click

SUBCOMMANDS = ("load",)
"""Each is `command` in a module `autoflux.cli.bench_NAME`, in the order of the help page."""


class Bench(click.Group):
    """The group; modules of its commands are imported when they are asked for."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        found: click.Command = importlib.import_module(f"autoflux.cli.bench_{name}").command
        return found


command = Bench("bench", help="Measure how a model runs on this machine.")
