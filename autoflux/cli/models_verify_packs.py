"""Reading packs again, for `autoflux models verify`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autoflux.cli.models_options import byte_progress
from autoflux.cli.output import stderr, stdout
from autoflux.errors import DamagedPack
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import Pack, check_pack
from autoflux.runtime.pack_file import checksum
from autoflux.units import format_bytes
from autoflux.values import Value


class CheckedPack(Value, frozen=True, kw_only=True):
    """A pack, and what of it is not what was written; "" if it is whole. A faulty one was removed."""

    key: str
    component: str
    storage: str
    nbytes: int
    fault: str


def check_packs(place: Path) -> list[CheckedPack]:
    """Read all packs made from files of a folder, or from a file, and drop those that have changed."""
    shelf = Shelf()
    packs = shelf.of_model(place)
    with byte_progress() as progress:
        task = progress.add_task("reading packs", total=sum(pack.nbytes for pack in packs))
        return [_check(pack, shelf, lambda count: progress.update(task, advance=count)) for pack in packs]


def show_packs(packs: list[CheckedPack]) -> None:
    """For people; nothing if there are none."""
    for pack in packs:
        if pack.fault:
            stdout.print(f"the packed {pack.component} in {pack.storage} has changed: {pack.fault}", markup=False)
    whole = [pack for pack in packs if not pack.fault]
    if whole:
        size = format_bytes(sum(pack.nbytes for pack in whole))
        stdout.print(f"{len(whole)} packs, {size}, all as they should be", markup=False)
    if len(whole) < len(packs):
        stderr.print("[bold]try:[/]   autoflux models pack NAME; what had changed was removed")


def _check(pack: Pack, shelf: Shelf, on_bytes: Callable[[int], None]) -> CheckedPack:
    opened = shelf.open(pack.key)
    fault = ""
    if opened:
        try:
            fault = check_pack(shelf.folder(pack.key), checksum, on_bytes)
        except DamagedPack as error:
            fault = error.message
        if fault:
            opened.drop()
        opened.close()
    return CheckedPack(
        key=pack.key, component=pack.component, storage=pack.storage.value, nbytes=pack.nbytes, fault=fault
    )
