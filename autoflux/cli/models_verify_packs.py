"""Reading packs again, for `autoflux models verify`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autoflux.cli.models_options import byte_progress
from autoflux.cli.output import hint, stdout
from autoflux.errors import DamagedPack
from autoflux.models.pack_shelf import Remains, Shelf
from autoflux.models.packs import Pack, check_pack
from autoflux.runtime.pack_file import checksum
from autoflux.units import counted, format_bytes
from autoflux.values import Value


class CheckedPack(Value, frozen=True, kw_only=True):
    """A pack, and what of it is not what was written; "" if it is whole.

    Where an index cannot be read, `component` and `storage` are "".
    """

    key: str
    component: str
    storage: str
    nbytes: int
    fault: str
    removed: bool
    """Whether it is gone, as all that are faulty should be."""


def check_packs(place: Path) -> list[CheckedPack]:
    """Read all packs made from files of a folder, or from a file, and drop those that have changed.

    Those whose index cannot be read may be anybody's, and are among them.

    Raises:
        OSError: the folder with the packs cannot be read.
    """
    shelf = Shelf()
    packs = shelf.of_model(place)
    with byte_progress() as progress:
        task = progress.add_task("reading packs", total=sum(pack.nbytes for pack in packs))
        faults = [_fault(pack, shelf, lambda count: progress.update(task, advance=count)) for pack in packs]
    found = [Remains(pack.key, pack, fault) for pack, fault in zip(packs, faults, strict=True)]
    found += [left for left in shelf.remains() if left.fault and (left.told is None or left.told.is_from(place))]
    # What has no index any more was removed by somebody while it was read.
    return [
        _checked(entry, shelf) for entry in {entry.key: entry for entry in found}.values() if shelf.holds(entry.key)
    ]


def show_packs(packs: list[CheckedPack]) -> None:
    """For people; nothing if there are none."""
    faulty = [pack for pack in packs if pack.fault]
    for pack in faulty:
        what = f"the packed {pack.component} in {pack.storage} is damaged: " if pack.component else ""
        stdout.print(f"{what}{pack.fault}", soft_wrap=True)
    whole = [pack for pack in packs if not pack.fault]
    if whole:
        size = format_bytes(sum(pack.nbytes for pack in whole))
        stdout.print(f"{counted(len(whole), 'pack')}, {size}, all as they should be", soft_wrap=True)
    if not all(pack.removed for pack in faulty):
        hint(f"make {str(Shelf().root)!r} writable; what is damaged could not be removed")
    elif faulty:
        hint("autoflux models pack NAME; what was damaged is removed")


def _fault(pack: Pack, shelf: Shelf, on_bytes: Callable[[int], None]) -> str:
    # Also where it cannot be kept from removal, as in a folder that cannot be written.
    opened = shelf.open(pack.key)
    try:
        return check_pack(shelf.folder(pack.key), checksum, on_bytes)
    except DamagedPack as error:
        return error.message
    finally:
        if opened:
            opened.close()


def _checked(found: Remains, shelf: Shelf) -> CheckedPack:
    key, told, fault = found
    if fault:
        shelf.drop(key)
    return CheckedPack(
        key=key,
        component=told.component if told else "",
        storage=told.storage.value if told else "",
        nbytes=told.nbytes if told else 0,
        fault=fault,
        removed=bool(fault) and not shelf.holds(key),
    )
