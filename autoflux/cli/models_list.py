"""`autoflux models list`: what is on this machine."""

from __future__ import annotations

import click
from rich.markup import escape
from rich.table import Table

from autoflux.cli.output import json_option, stdout, succeed
from autoflux.models.hubs.cached import CachedModel, cached_models
from autoflux.models.hubs.stores import stores
from autoflux.plugin_manager import Plugins
from autoflux.units import format_bytes


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Everything in the hubs' caches, not only picture models.")
@json_option
@click.pass_obj
def command(plugins: Plugins, *, everything: bool, as_json: bool) -> None:
    """List registered models and those in the caches of Hugging Face and ModelScope."""
    models = cached_models(stores(), everything=everything)
    if as_json:
        registered = [{"name": entry.name, "path": str(entry.path)} for entry in plugins.models]
        succeed({"registered": registered, "models": [model.to_data() for model in models]})
        return
    stdout.print(_table(plugins, models))


def _table(plugins: Plugins, models: list[CachedModel]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("name", "source", "size", "state", "path"):
        table.add_column(column, overflow="fold", header_style="dim", justify="right" if column == "size" else "left")
    for entry in plugins.models:
        table.add_row(
            escape(entry.name), escape(plugins.models.owner(entry.name)), "", "ready", escape(str(entry.path))
        )
    for model in models:
        state = "complete" if model.complete else f"[yellow]{len(model.missing)} missing[/]"
        table.add_row(escape(model.name), model.source.value, format_bytes(model.size_bytes), state, escape(model.path))
    return table
