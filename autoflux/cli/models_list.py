"""`autoflux models list`: what is on this machine."""

from __future__ import annotations

import click
from rich.markup import escape
from rich.table import Table

from autoflux.cli.models_pack import pack_data
from autoflux.cli.output import json_option, stdout, succeed
from autoflux.models.hubs.cached import CachedModel, cached_models
from autoflux.models.hubs.stores import stores
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import Pack
from autoflux.plugin_manager import Plugins
from autoflux.units import format_bytes


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Everything in the hubs' caches, not only picture models.")
@json_option
@click.pass_obj
def command(plugins: Plugins, *, everything: bool, as_json: bool) -> None:
    """List registered models, those in the caches of Hugging Face and ModelScope, and packed weights."""
    models = cached_models(stores(), everything=everything)
    packs = Shelf().packs()
    if as_json:
        registered = [{"name": entry.name, "path": str(entry.path)} for entry in plugins.models]
        packed = [pack_data(pack) for pack in packs]
        succeed({"registered": registered, "models": [model.to_data() for model in models], "packs": packed})
        return
    stdout.print(_table(plugins, models))
    if packs:
        stdout.print()
        stdout.print(_packs(packs))


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


def _packs(packs: list[Pack]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("packed", "of", "precision", "size"):
        table.add_column(column, overflow="fold", header_style="dim", justify="right" if column == "size" else "left")
    for pack in sorted(packs, key=lambda pack: (pack.model, pack.component, pack.storage)):
        table.add_row(escape(pack.component), escape(pack.model), pack.storage.value, format_bytes(pack.nbytes))
    return table
