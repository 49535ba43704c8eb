"""`autoflux models pack`: write a model's weights as they are used, for a quick start."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.progress import TaskID

from autoflux.api import find_model
from autoflux.cli.models_options import byte_progress
from autoflux.cli.options import base_option
from autoflux.cli.output import json_option, stderr, stdout, succeed, warn
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import NARROW_FORMATS, WIDE_FORMATS, Pack, Recipe, recipes
from autoflux.models.values import Model, Precision
from autoflux.plugin_manager import Plugins
from autoflux.units import format_bytes, format_seconds
from autoflux.values import Value

_WIDE = [precision.value for precision in WIDE_FORMATS]


class RemovedPacks(Value, frozen=True, kw_only=True):
    """Packs that are gone, and keys of those that stay because they are in use."""

    removed: tuple[str, ...]
    freed_bytes: int
    in_use: tuple[str, ...]


@click.command("pack")
@click.argument("name", metavar="NAME|PATH")
@click.option(
    "--precision",
    type=click.Choice([*[p.value for p in NARROW_FORMATS], *_WIDE]),
    default=Precision.BFLOAT16.value,
    show_default=True,
    help="Of the transformer's weights.",
)
@click.option(
    "--arithmetic",
    type=click.Choice(_WIDE),
    help="Of everything else, as the plan has it: by default --precision, with 8 bits bfloat16.",
)
@base_option
@click.option("--rm", "removing", is_flag=True, help="Delete the packs of the model, of all precisions, instead.")
@json_option
@click.pass_obj
def command(
    plugins: Plugins,
    *,
    name: str,
    precision: str,
    arithmetic: str | None,
    base: str | None,
    removing: bool,
    as_json: bool,
) -> None:
    """Write a model's weights once in the order and precision they are used in, so that it starts quickly.

    They go to autoflux's cache, within AUTOFLUX_PACK_LIMIT; those least recently used make room.
    """
    model = find_model(name, plugins, base)
    if removing:
        removed = remove_packs(Shelf().of_model(Path(model.path)))
        if as_json:
            succeed(removed.to_data())
        else:
            tell_removed(removed)
        return
    storage = Precision(precision)
    wide = Precision(arithmetic) if arithmetic else Precision.BFLOAT16 if storage in NARROW_FORMATS else storage
    began = time.perf_counter()
    packs = make_packs(model, recipes(model, storage, wide))
    seconds = time.perf_counter() - began
    if as_json:
        succeed({"packs": [pack_data(pack) for pack in packs], "seconds": seconds})
        return
    for pack in packs:
        stdout.print(f"{pack.component}: {format_bytes(pack.nbytes)}, {pack.storage.value}", markup=False)
    stderr.print(f"{format_bytes(sum(pack.nbytes for pack in packs))} in {format_seconds(seconds)}", style="dim")


def pack_data(pack: Pack) -> dict[str, Any]:
    """A pack without its tensors."""
    return {key: value for key, value in pack.to_data().items() if key != "tensors"}


def remove_packs(packs: Iterable[Pack]) -> RemovedPacks:
    """Delete these packs, but for those in use."""
    shelf = Shelf()
    removed: list[Pack] = []
    in_use: list[Pack] = []
    for pack in packs:
        (removed if shelf.remove(pack.key) else in_use).append(pack)
    return RemovedPacks(
        removed=tuple(pack.key for pack in removed),
        freed_bytes=sum(pack.nbytes for pack in removed),
        in_use=tuple(pack.key for pack in in_use),
    )


def tell_removed(packs: RemovedPacks) -> None:
    """For people; nothing if there were none."""
    if packs.removed:
        stdout.print(f"removed {len(packs.removed)} packs: {format_bytes(packs.freed_bytes)} freed")
    if packs.in_use:
        warn(f"{len(packs.in_use)} packs are in use and stay; `autoflux models pack NAME --rm` removes them later")


def make_packs(model: Model, wanted: Iterable[Recipe]) -> list[Pack]:
    """Write what is not there yet, with a bar on stderr. Raises as `pack_component`."""
    from autoflux.runtime.packing import pack_component  # noqa: PLC0415 — imports torch

    shelf, packs = Shelf(), []
    with byte_progress() as progress:
        for recipe in wanted:
            task = progress.add_task(f"packing {recipe.component.name}", total=None)

            def on_bytes(count: int, total: int, task: TaskID = task) -> None:
                progress.update(task, advance=count, total=total)

            packs.append(pack_component(recipe, model, shelf, on_bytes=on_bytes))
            progress.remove_task(task)
    return packs
