"""`autoflux models pack`: write a model's weights as they are used, for a quick start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click
from rich.progress import TaskID

from autoflux.api import find_model
from autoflux.cli.models_options import byte_progress
from autoflux.cli.models_pack_rm import RemovedPacks, remove_packs_of, tell_removed
from autoflux.cli.options import base_option
from autoflux.cli.output import fail, json_option, stderr, stdout, succeed
from autoflux.errors import ContradictoryWishes
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import NARROW_FORMATS, WIDE_FORMATS, Pack, Recipe, recipes
from autoflux.models.values import Model, Precision
from autoflux.plugin_manager import Plugins
from autoflux.units import format_bytes, format_seconds

_WIDE = [precision.value for precision in WIDE_FORMATS]


@click.command("pack")
@click.argument("name", metavar="NAME|PATH")
@click.option(
    "--precision",
    type=click.Choice([*[p.value for p in NARROW_FORMATS], *_WIDE]),
    help="Of the transformer's weights; by default --arithmetic, or bfloat16.",
)
@click.option(
    "--arithmetic",
    type=click.Choice(_WIDE),
    help="Of everything else, as the plan has it: by default --precision, with 8 bits bfloat16.",
)
@base_option
@click.option(
    "--rm",
    "removing",
    is_flag=True,
    help="Delete the packs of the model instead, but those that another packed model uses: of all precisions, with "
    "--precision those of the transformer in that one, with --arithmetic those with everything else in that one.",
)
@json_option
@click.pass_obj
def command(
    plugins: Plugins,
    *,
    name: str,
    precision: str | None,
    arithmetic: str | None,
    base: str | None,
    removing: bool,
    as_json: bool,
) -> int:
    """Write a model's weights once in the order and precision they are used in, so that it starts quickly.

    They go to autoflux's cache, within AUTOFLUX_PACK_LIMIT; those least recently used make room.
    """
    storage, wide = (Precision(given) if given else None for given in (precision, arithmetic))
    if removing:
        removed = remove_packs_of(name, plugins, storage, wide)
        return _tell(removed, name, as_json=as_json)
    formats = _formats(storage, wide)
    model = find_model(name, plugins, base)
    began = time.perf_counter()
    packs = make_packs(model, recipes(model, *formats))
    seconds = time.perf_counter() - began
    if as_json:
        succeed({"packs": [pack_data(pack) for pack in packs], "seconds": seconds})
        return 0
    for pack in packs:
        stdout.print(f"{pack.component}: {format_bytes(pack.nbytes)}, {pack.storage.value}")
    stderr.print(f"{format_bytes(sum(pack.nbytes for pack in packs))} in {format_seconds(seconds)}", style="dim")
    return 0


def pack_data(pack: Pack) -> dict[str, Any]:
    """A pack without its tensors."""
    return {key: value for key, value in pack.to_data().items() if key != "tensors"}


def make_packs(model: Model, wanted: Sequence[Recipe]) -> list[Pack]:
    """Write what is not there yet, with a bar on stderr; none makes room for another of them.

    Raises:
        DiskFull: all together are more than packs may take; none was written. Or as `pack_component`.
        AutofluxError: as `pack_component`.
    """
    from autoflux.runtime.packing import pack_component  # noqa: PLC0415 — imports torch

    shelf, packs = Shelf(), []
    with shelf.kept(recipe.key() for recipe in wanted), byte_progress() as progress:
        shelf.check_limit(sum(recipe.nbytes() for recipe in wanted), "the packs of this model")
        for recipe in wanted:
            task = progress.add_task(f"packing {recipe.component.name}", total=None)

            def on_bytes(count: int, total: int, task: TaskID = task) -> None:
                progress.update(task, advance=count, total=total)

            packs.append(pack_component(recipe, model, shelf, on_bytes=on_bytes))
            progress.remove_task(task)
    return packs


def _formats(storage: Precision | None, arithmetic: Precision | None) -> tuple[Precision, Precision]:
    """What a transformer's matrices are to be held as, and everything else.

    Raises:
        ContradictoryWishes: both are wide, and not the same. No plan has that, so that the packs would be of no use.
    """
    storage = storage or arithmetic or Precision.BFLOAT16
    wide = arithmetic or (Precision.BFLOAT16 if storage in NARROW_FORMATS else storage)
    if storage not in NARROW_FORMATS and storage != wide:
        raise ContradictoryWishes(
            f"--precision {storage.value} and --arithmetic {wide.value} exclude each other: weights that are not held "
            "in 8 bits are held as they are computed with",
            hint="give one of the two",
        )
    return storage, wide


def _tell(removed: RemovedPacks, name: str, *, as_json: bool) -> int:
    if as_json and removed.error:
        fail(removed.error, removed.to_data())
    elif as_json:
        succeed(removed.to_data())
    else:
        tell_removed(removed)
        if removed == RemovedPacks():
            stderr.print(f"{name}: there are no packs to remove", soft_wrap=True)
    return 1 if removed.error else 0
