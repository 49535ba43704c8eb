"""Reading packs again, for `autoflux models verify`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autoflux.cli.models_options import byte_progress
from autoflux.cli.output import hint, stdout
from autoflux.errors import DamagedPack, UnreadablePack
from autoflux.models.pack_shelf import Remains, Shelf
from autoflux.models.packs import PACK_SCHEMA, Pack, check_pack
from autoflux.runtime.pack_file import checksum
from autoflux.units import counted, format_bytes
from autoflux.values import Value


class CheckedPack(Value, frozen=True, kw_only=True):
    """A pack, and what of it is not what was written, or why it cannot be read now; "" if it is whole.

    Where an index cannot be read, `component` and `storage` are "".
    """

    key: str
    component: str
    storage: str
    nbytes: int
    fault: str
    checked: bool
    """False if it cannot be read now; it may be whole then, and stays."""
    outdated: bool
    """Whether another version of autoflux made it, so that it is of no use here; not a fault of the model."""
    removed: bool
    """Whether it is gone, as all that were checked and are faulty or outdated should be."""

    @property
    def is_faulty(self) -> bool:
        """Whether it is not what was written, or could not be read."""
        return bool(self.fault) and not self.outdated


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
        read = [_read(pack, shelf, lambda count: progress.update(task, advance=count)) for pack in packs]
    left = [left for left in shelf.remains() if left.fault and (left.told is None or left.told.is_from(place))]
    found = {entry.key: entry for entry in (*read, *left)}
    remained = {entry.key for entry in left}
    # What has no index any more was removed by somebody while it was read.
    return [_checked(e, shelf, only_remains=e.key in remained) for e in found.values() if shelf.holds(e.key)]


def show_packs(packs: list[CheckedPack]) -> None:
    """For people; nothing if there are none."""
    faulty = [pack for pack in packs if pack.fault]
    for pack in faulty:
        state = "is of no use any more" if pack.outdated else "is damaged" if pack.checked else "could not be checked"
        what = f"the packed {pack.component} in {pack.storage} {state}: " if pack.component else ""
        stdout.print(f"{what}{pack.fault}", soft_wrap=True)
    whole = [pack for pack in packs if not pack.fault]
    if whole:
        size = format_bytes(sum(pack.nbytes for pack in whole))
        stdout.print(f"{counted(len(whole), 'pack')}, {size}, all as they should be", soft_wrap=True)
    damaged = [pack for pack in faulty if pack.checked]
    if len(damaged) < len(faulty):
        hint(f"check who may read {str(Shelf().root)!r}, and its disk; what cannot be read now may be whole, and stays")
    if not all(pack.removed for pack in damaged):
        hint(f"make {str(Shelf().root)!r} writable; what is told above could not be removed")
    elif damaged:
        hint("autoflux models pack NAME; what is told above was removed")


def _read(pack: Pack, shelf: Shelf, on_bytes: Callable[[int], None]) -> Remains:
    opened = None
    try:
        # Also where it cannot be kept from removal, as in a folder that cannot be written.
        opened = shelf.open(pack.key)
        return Remains(pack.key, pack, check_pack(shelf.folder(pack.key), checksum, on_bytes))
    except DamagedPack as error:
        return Remains(pack.key, pack, error.message, unreadable=isinstance(error, UnreadablePack))
    finally:
        if opened:
            opened.close()


def _checked(found: Remains, shelf: Shelf, *, only_remains: bool) -> CheckedPack:
    key, told, fault, unreadable = found
    damaged = bool(fault) and not unreadable
    if damaged:
        shelf.drop(key, only_remains=only_remains)
    return CheckedPack(
        key=key,
        component=told.component if told else "",
        storage=told.storage.value if told else "",
        nbytes=told.nbytes if told else 0,
        fault=fault,
        checked=not unreadable,
        outdated=damaged and told is not None and told.schema != PACK_SCHEMA,
        removed=damaged and not shelf.holds(key),
    )
