"""`autoflux models list`: what is on this machine."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from autoflux.cli.models_pack import pack_data
from autoflux.cli.output import json_option, print_whole, stdout, succeed
from autoflux.cli.tables import table
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
    print_whole(_table(plugins, models))
    if packs:
        stdout.print()
        print_whole(_packs(packs))


def _table(plugins: Plugins, models: list[CachedModel]) -> Table:
    shown = table("name", "source", "size", "state", "path", right=("size",))
    for entry in plugins.models:
        shown.add_row(entry.name, plugins.models.owner(entry.name), "", "ready", entry.path)
    for model in models:
        size = "" if model.unreadable else format_bytes(model.size_bytes)
        shown.add_row(model.name, model.source.value, size, _state(model), model.path)
    return shown


def _state(model: CachedModel) -> str | Text:
    if model.complete:
        return "complete"
    wrong = f"{len(model.missing)} missing"
    if model.unreadable:
        wrong = f"cannot be read: {model.unreadable}"
    elif model.unusable:
        wrong = f"cannot be run: {model.unusable}"
    return Text(wrong, style="yellow")


def _packs(packs: list[Pack]) -> Table:
    shown = table("packed", "of", "precision", "size", right=("size",))
    for pack in sorted(packs, key=lambda pack: (pack.model, pack.component, pack.storage)):
        shown.add_row(pack.component, pack.model, pack.storage.value, format_bytes(pack.nbytes))
    return shown
