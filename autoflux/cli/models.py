"""`autoflux models`: the models on this machine, and how they get there."""

from __future__ import annotations

import importlib

import click

SUBCOMMANDS = ("list", "show", "pull", "verify", "pack", "rm")
"""Each is `command` in a module `autoflux.cli.models_NAME`, in the order of the help page."""


class Models(click.Group):
    """The group; modules of its commands are imported when they are asked for."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        found: click.Command = importlib.import_module(f"autoflux.cli.models_{name}").command
        return found


command = Models("models", help="List, describe, download, verify, pack and remove models.")
