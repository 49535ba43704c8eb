"""`autoflux models show`: what a model is, from its headers."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from autoflux.api import find_model
from autoflux.cli.options import base_option
from autoflux.cli.output import json_option, stdout, succeed
from autoflux.cli.tables import table
from autoflux.models import catalogue
from autoflux.models.values import Component, Layout, Model, Naming
from autoflux.plugin_manager import Plugins
from autoflux.units import format_bytes

_NAMES = {Naming.DIFFUSERS: "diffusers", Naming.BFL: "BFL", Naming.LDM: "LDM"}


@click.command("show")
@click.argument("model", metavar="PATH|NAME")
@base_option
@json_option
@click.pass_obj
def command(plugins: Plugins, *, model: str, base: str | None, as_json: bool) -> None:
    """Say what a folder, a file or a name is: layout, family, components, parameters, precisions, bytes, blocks."""
    found = find_model(model, plugins, base, absent=True)
    if as_json:
        succeed(_data(found))
        return
    stdout.print(Text.assemble((found.family.value, "bold"), f", {found.layout.value}"), soft_wrap=True)
    for line in _about(found):
        stdout.print(line, soft_wrap=True)
    for part in (_components(found), _blocks(found)):
        stdout.print()
        stdout.print(part)


def _data(model: Model) -> dict[str, Any]:
    data = model.to_data()
    entry = catalogue.find(model.name)
    parameters = {component.name: component.parameter_count for component in model.components}
    return data | {
        "parameters": parameters,
        "disk_bytes": model.disk_bytes,
        "published": entry.to_data() if entry else None,
    }


def _about(model: Model) -> list[str]:
    lines = [f"path      {model.path}"] if model.path else []
    if model.base_path:
        lines.append(f"base      {model.base_path}")
    if entry := catalogue.find(model.name):
        gate = ", to be accepted on Hugging Face first" if entry.gated else ""
        lines.append(f"licence   {entry.licence}{gate}: https://huggingface.co/{entry.huggingface}")
    if model.layout == Layout.ABSENT:
        lines.append(f"get it    autoflux models pull {model.name}")
    size = model.architecture
    guided = "guidance" if size.guidance else "no guidance"
    channels = model.component("transformer").config["in_channels"]
    blocks = f"{size.double_blocks} double and {size.single_blocks} single blocks of {size.hidden_size}"
    return [*lines, f"sizes     {blocks}, {guided}, {channels} channels"]


def _components(model: Model) -> Any:
    shown = table("component", "parameters", "stored as", "bytes", "names", "from", title="Components")
    for component in model.components:
        shown.add_row(
            component.name,
            f"{component.parameter_count:,}",
            _formats(component),
            format_bytes(component.disk_bytes),
            _NAMES[component.naming],
            _source(model, component),
        )
    total = sum(component.parameter_count for component in model.components)
    shown.add_row("all", f"{total:,}", "", format_bytes(model.disk_bytes), "", "")
    return shown


def _formats(component: Component) -> str:
    """Formats that make up at least half a per cent, with their shares if there are several."""
    shares = {name: count / component.parameter_count for name, count in component.formats.items()}
    main = {name: share for name, share in shares.items() if share >= 0.005}
    named = [f"{name} {share:.0%}" if len(main) > 1 else name for name, share in main.items()]
    return ", ".join(named) + (", scaled" if component.scaled else "")


def _source(model: Model, component: Component) -> str:
    if not component.files:
        return "catalogue"
    count = len(component.files)
    where = "base" if model.base_path and component.folder else "file" if model.base_path else "folder"
    return where + (f", {count} files" if count > 1 else "")


def _blocks(model: Model) -> Any:
    shown = table("block list", "blocks", "a block", "matmul", "modulation", "other", "bytes", title="Blocks")
    for component in model.components:
        for blocks in component.block_lists:
            count, size = blocks.blocks[0].parameters, blocks.blocks[0].disk_bytes
            other = count.total - count.matmul - count.modulation
            numbers = map(_millions, (count.total, count.matmul, count.modulation, other))
            shown.add_row(blocks.path, str(len(blocks.blocks)), *numbers, format_bytes(size))
    return shown


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count else "-"
