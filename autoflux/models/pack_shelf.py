"""Where packs lie: found, made and removed by many processes at once, within a limit of bytes.

A pack is there once its folder `packs/KEY` holds an index, and that folder appears whole: it is renamed into place.
While it is made it is `packs/.KEY.partial`. `packs/locks` says who makes, uses or removes one: see `pack_locks`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from autoflux.errors import AutofluxError, DamagedPack, DiskFull, OutputUnwritable, UnreadablePack, UsageError
from autoflux.files import flush_folder
from autoflux.models.pack_locks import PackLocks, let_go
from autoflux.models.packs import INDEX, KEY_DIGITS, NOT_THERE, WEIGHTS, Pack, Recipe, parse_index, read_index
from autoflux.models.values import Model
from autoflux.paths import cache_dir
from autoflux.units import GIB, format_bytes, parse_bytes, told_apart

LIMIT = "AUTOFLUX_PACK_LIMIT"
NO_PACK = "AUTOFLUX_NO_PACK"

USUAL_LIMIT_BYTES = 120 * GIB
"""Three FLUX.1 in 8 bits with encoders, and one in bfloat16."""

USUAL_SHARE = 4
"""No more than one part in so many of the disk."""

LEFT_FREE_BYTES = GIB
"""Room that packing leaves on the disk for others."""

OPEN_SECONDS = 10.0
"""How long to wait for somebody who removes a pack before doing without it."""

_KEY = f"[0-9a-f]{{{KEY_DIGITS}}}"
_FOLDER = re.compile(rf"{_KEY}|\.{_KEY}\.partial")
"""Whatever has another name is not ours."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)


class OpenPack:
    """A pack that nobody removes until it is closed, or forgotten."""

    def __init__(self, pack: Pack, folder: Path, shelf: Shelf, use: FileLock) -> None:
        self.pack = pack
        self.weights = folder / WEIGHTS
        self._shelf = shelf
        self._release = weakref.finalize(self, let_go, use)

    def drop(self) -> None:
        """Close it and give it up as damaged: it is no pack any more, whoever else has it open."""
        self._release()
        self._shelf.drop(self.pack.key)

    def close(self) -> None:
        """Let others remove it."""
        self._release()


class Remains(NamedTuple):
    """What takes room and is no pack: damaged, of another version, unfinished, or given up while somebody reads it; or
    what cannot be read now, and may be one."""

    key: str
    told: Pack | None
    """What its index says, if that can be read."""
    fault: str
    """Why it is no pack any more; "" where it never was one, or was given up."""
    unreadable: bool = False
    """It may be whole, and is not to be deleted."""


class Shelf:
    """All packs of this user."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir() / "packs"
        self._locks = PackLocks(self.root / "locks")

    def folder(self, key: str) -> Path:
        """Where the pack of that key is, or would be."""
        return self.root / key

    def packs(self) -> list[Pack]:
        """Those that are there, least recently used first."""
        found = []
        with contextlib.suppress(OSError):
            for folder in self._folders():
                with contextlib.suppress(DamagedPack, OSError):
                    found.append(((folder / INDEX).stat().st_mtime_ns, read_index(folder)))
        return [pack for _, pack in sorted(found, key=lambda entry: (entry[0], entry[1].key))]

    def remains(self) -> list[Remains]:
        """What is there beside packs, also what is just being made.

        Raises:
            OSError: the folder cannot be read.
        """
        found: dict[str, Remains] = {}
        for folder in self._folders():
            key = folder.name.removeprefix(".").removesuffix(".partial")
            if folder == self._partial(key):
                found.setdefault(key, Remains(key, None, ""))
            elif remains := self._remains(key):
                found[key] = remains
        return list(found.values())

    def holds(self, key: str) -> bool:
        """Whether anything there calls itself the pack of that key, right or wrong."""
        try:
            (self.folder(key) / INDEX).lstat()
        except NOT_THERE:
            return False
        except OSError:
            return True  # it cannot be looked at
        return True

    def find(self, key: str) -> Pack | None:
        """The pack of that key, if it is there and its index can be read."""
        try:
            return read_index(self.folder(key))
        except DamagedPack:
            return None

    def open(self, key: str) -> OpenPack | None:
        """The pack of that key, kept from removal; None if it is not there or cannot be kept.

        Raises:
            DamagedPack: as `read_index`.
        """
        if not self.holds(key):
            return None
        try:
            with self._locks.gate(key, OPEN_SECONDS):
                if not self.holds(key):
                    return None  # it was just removed
                pack = read_index(self.folder(key))
                use = self._locks.use(key)
                os.utime(self.folder(key) / INDEX)
        except (Timeout, OSError):
            return None
        return OpenPack(pack, self.folder(key), self, use)

    @contextmanager
    def kept(self, keys: Iterable[str]) -> Iterator[None]:
        """Packs of these keys are not removed meanwhile, whether they are there already or are made meanwhile.

        Raises:
            OutputUnwritable: the folder cannot be written.
        """
        with contextlib.ExitStack() as uses:
            with self._disk_errors():
                for key in keys:
                    with self._locks.gate(key, -1):
                        uses.callback(let_go, self._locks.use(key))
            yield

    @contextmanager
    def making(self, key: str, nbytes: int) -> Iterator[Path | None]:
        """A folder in which to write a pack whose weights take `nbytes`; the pack is there when the context ends well.

        Its file of weights is there already, of full size, so that a full disk shows before the work. Waits for others
        that make the same, and gives None if it is there then. Others are removed if the limit asks for it, least
        recently used first.

        Raises:
            DiskFull: no room on the disk, or within the limit; nothing is left behind.
            OutputUnwritable: the folder cannot be written.
        """
        with self._disk_errors(), self._locks.gate(key, -1):
            if self.find(key):
                yield None
                return
            partial = self._partial(key)
            try:
                self._reserve(key, partial, nbytes)
                yield partial
                shutil.rmtree(self.folder(key), ignore_errors=True)
                partial.rename(self.folder(key))
                flush_folder(self.root)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def remove(self, key: str, *, only_remains: bool = False) -> bool:
        """Delete a pack, or what remains of one; False if somebody uses or makes it, or has deleted it before.

        With `only_remains` also if it is a pack by now, or may be one.

        Raises:
            OutputUnwritable: it cannot be deleted.
        """
        try:
            with self._locks.gate(key, 0):
                if self._locks.in_use(key):
                    return False
                return self._delete(key, only_remains=only_remains)
        except Timeout:
            return False
        except OSError as error:
            raise OutputUnwritable(
                f"cannot delete the pack {str(self.folder(key))!r}: {error.strerror or error}",
                hint="check who may write there, and how its disk is mounted",
            ) from error

    def of_model(self, place: Path) -> list[Pack]:
        """Those made from files in this folder, or from this file."""
        return [pack for pack in self.packs() if pack.is_from(place)]

    def made_for(self, model: Model) -> list[Pack]:
        """Those that loading this model would find, of any precision.

        Raises:
            AutofluxError: a source file cannot be read any more.
        """
        parts = {component.name: component for component in model.components if component.files}
        return [
            pack
            for pack in self.packs()
            if pack.component in parts
            and pack.key == Recipe(parts[pack.component], pack.storage, pack.arithmetic).key()
        ]

    def drop(self, key: str, *, only_remains: bool = False) -> None:
        """Let a damaged pack not be taken for one any more; its bytes go once nobody reads them.

        With `only_remains` it stays if it is a pack by now, or may be one.
        """
        with contextlib.suppress(Timeout, OSError), self._locks.gate(key, OPEN_SECONDS):
            if not self._locks.in_use(key):
                self._delete(key, only_remains=only_remains)
            elif not only_remains or self._is_remains(key):
                self._unlink_index(key)

    def sweep(self, making: str = "") -> None:
        """Delete what was left by processes that were ended, and packs of other versions; not what is just `making`."""
        for remains in self.remains():
            if remains.key != making:
                with contextlib.suppress(OutputUnwritable):
                    self.remove(remains.key, only_remains=True)

    @property
    def used_bytes(self) -> int:
        """What packs take, and those that are being made."""
        return _size(folder / WEIGHTS for folder in self._folders())

    def bytes_of(self, key: str) -> int:
        """What a pack takes, or what remains of one."""
        return _size([self.folder(key) / WEIGHTS, self._partial(key) / WEIGHTS])

    def check_limit(self, nbytes: int, who: str = "the pack") -> None:
        """Refuse what cannot be there however many others go.

        Raises:
            DiskFull: it is more than all packs may take, or on a small disk more than is free.
        """
        limit = limit_bytes(self.root)
        if nbytes <= limit:
            return
        if not os.environ.get(LIMIT):
            self._check_disk(nbytes, who)  # a share of a disk that is too small anyway is no limit to raise
        need, have = told_apart(nbytes, limit)
        raise DiskFull(f"{who} would take {need}, and packs may take {have}", hint=f"raise {LIMIT}")

    def _reserve(self, key: str, partial: Path, nbytes: int) -> None:
        # One after the other, so that two do not both take what room there is.
        with self._locks.room():
            shutil.rmtree(partial, ignore_errors=True)
            self.sweep(making=key)
            self._make_room(nbytes)
            partial.mkdir()
            with (partial / WEIGHTS).open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                else:
                    file.truncate(nbytes)

    def _make_room(self, nbytes: int) -> None:
        self.check_limit(nbytes)
        limit = limit_bytes(self.root)
        while (used := self.used_bytes) + nbytes > limit:
            idle = [pack for pack in self.packs() if self._locks.is_idle(pack.key)]
            in_use = used - sum(pack.nbytes for pack in idle)
            if in_use + nbytes <= limit:
                self.remove(idle[0].key)
            elif self.used_bytes >= used:  # others have removed none meanwhile
                raise DiskFull(
                    f"the pack would take {format_bytes(nbytes)}, and the others, which are in use, leave "
                    f"{format_bytes(max(0, limit - in_use))} of {format_bytes(limit)}",
                    hint=f"end what uses them, or raise {LIMIT}",
                )
        self._check_disk(nbytes, "the pack")

    def _check_disk(self, nbytes: int, who: str) -> None:
        free = shutil.disk_usage(self.root).free
        if free < nbytes + LEFT_FREE_BYTES:
            raise DiskFull(
                f"{who} would take {format_bytes(nbytes)} and have to leave {format_bytes(LEFT_FREE_BYTES)} to others, "
                f"and {format_bytes(free)} are free at {str(self.root)!r}",
                hint="make room, or set AUTOFLUX_CACHE_DIR to a folder on another disk",
            )

    def _folders(self) -> list[Path]:
        try:
            return [Path(entry) for entry in os.scandir(self.root) if _FOLDER.fullmatch(entry.name) and entry.is_dir()]
        except NOT_THERE:
            return []

    def _partial(self, key: str) -> Path:
        return self.root / f".{key}.partial"

    def _remains(self, key: str) -> Remains | None:
        folder, told = self.folder(key), None
        try:
            told = parse_index(folder)
            read_index(folder)
        except UnreadablePack as error:
            return Remains(key, told, error.message, unreadable=True)
        except DamagedPack as error:
            return Remains(key, told, error.message if self.holds(key) else "")
        return None

    def _is_remains(self, key: str) -> bool:
        remains = self._remains(key)
        return remains is not None and not remains.unreadable

    def _delete(self, key: str, *, only_remains: bool) -> bool:
        """Behind the gate; whether there was anything. With `only_remains` not what is a pack, or may be one."""
        goes, went = not only_remains or self._is_remains(key), False
        if goes:
            self._unlink_index(key)
        for folder in (self._partial(key), *([self.folder(key)] if goes else [])):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
                went = goes
        return went

    def _unlink_index(self, key: str) -> None:
        (self.folder(key) / INDEX).unlink(missing_ok=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except AutofluxError:
            raise
        except OSError as error:
            if error.errno in _FULL:
                raise DiskFull(
                    f"the disk is full ({error.strerror}) at {str(self.root)!r}; nothing of the pack is kept",
                    hint="make room, or set AUTOFLUX_CACHE_DIR to a folder on another disk",
                ) from error
            raise OutputUnwritable(
                f"cannot write a pack in {str(self.root)!r}: {error.strerror or error}",
                hint="set AUTOFLUX_CACHE_DIR to a folder that can be written",
            ) from error


def limit_bytes(root: Path) -> int:
    """How many bytes all packs may take: `AUTOFLUX_PACK_LIMIT` (0 allows none), else 120 GiB or a quarter of the disk.

    Raises:
        UsageError: the variable is not a size.
    """
    if said := os.environ.get(LIMIT):
        try:
            return 0 if said.strip() == "0" else parse_bytes(said)
        except UsageError as error:
            told = f"{LIMIT}={said!r} is neither 0 nor a size"
            raise UsageError(told, hint="write a size such as 80GB, or 0 for no packs") from error
    return min(USUAL_LIMIT_BYTES, shutil.disk_usage(root).total // USUAL_SHARE)


def packs_wanted() -> bool:
    """Whether packs may be used: not with `--no-pack`, which sets `AUTOFLUX_NO_PACK`."""
    return os.environ.get(NO_PACK, "") in ("", "0")


def _size(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with contextlib.suppress(OSError):  # others may remove it
            total += file.stat().st_size
    return total
