"""`autoflux plugins`: what is installed, what is missing, what is broken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from rich.text import Text

from autoflux.cli.output import json_option, stdout, succeed
from autoflux.cli.tables import table
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
    listed = table("kind", "name", "plugin", "about")
    for offer in offers:
        about = Text(f"not ready: {offer['missing']}", style="yellow") if offer["missing"] else offer["about"]
        listed.add_row(offer["kind"], offer["name"], offer["plugin"], about)
    stdout.print(listed)
    for problem in plugins.problems:
        broken = Text.assemble(("broken:", "bold red"), f" {problem.plugin}: {problem.message}")
        stdout.print(broken, soft_wrap=True)


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
