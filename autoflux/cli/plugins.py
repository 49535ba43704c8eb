"""`autoflux plugins`: what is installed, what is missing, what is broken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from autoflux.cli.output import json_option, stdout, succeed
from autoflux.plugin_manager import PluginProblem, Plugins, Registry


@click.command("plugins")
@json_option
@click.pass_obj
def command(plugins: Plugins, *, as_json: bool) -> None:
    """List backends, frontends, models, profiles and commands, and the plugins that offer them."""
    offers = list(_offers(plugins))
    if as_json:
        succeed({"offers": offers, "plugins": plugins.sources, "problems": [_problem(p) for p in plugins.problems]})
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("kind", "name", "plugin", "about"):
        table.add_column(column, overflow="fold", header_style="dim")
    for offer in offers:
        about = f"[yellow]not ready: {escape(offer['missing'])}[/]" if offer["missing"] else escape(offer["about"])
        table.add_row(offer["kind"], escape(offer["name"]), escape(offer["plugin"]), about)
    stdout.print(table)
    for problem in plugins.problems:
        stdout.print(f"[bold red]broken:[/] {escape(problem.plugin)}: {escape(problem.message)}", soft_wrap=True)


def _offers(plugins: Plugins) -> Iterator[dict[str, Any]]:
    registries: tuple[Registry[Any], ...] = (
        plugins.backends,
        plugins.frontends,
        plugins.models,
        plugins.profiles,
        plugins.commands,
    )
    for registry in registries:
        for offer in registry:
            owner = registry.owner(offer.name)
            yield {
                "kind": registry.kind,
                "name": offer.name,
                "plugin": owner if plugins.sources.get(owner) == "built in" else f"{owner} ({plugins.sources[owner]})",
                "about": _about(offer),
                "missing": offer.missing() if hasattr(offer, "missing") else None,
            }


def _about(offer: Any) -> str:
    if isinstance(offer, click.Command):
        return offer.get_short_help_str(80)
    described: str | None = getattr(offer, "description", None)
    return described or (type(offer).__doc__ or "").strip().partition("\n")[0]


def _problem(problem: PluginProblem) -> dict[str, str]:
    return {"plugin": problem.plugin, "message": problem.message, "details": problem.details}
