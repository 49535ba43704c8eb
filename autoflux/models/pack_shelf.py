"""Where packs lie: found, made and removed by many processes at once, within a limit of bytes.

A pack is there once its folder `packs/KEY` holds an index, and that folder appears whole: it is renamed into place.
While it is made it is `packs/.KEY.partial`. Locks, which the system releases when a process ends in any way, say who
makes, uses or removes one: `locks/KEY.lock` is held for making and removing, `locks/KEY.N.use` by each user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from autoflux.errors import AutofluxError, DamagedPack, DiskFull, OutputUnwritable
from autoflux.models.packs import INDEX, WEIGHTS, Pack, Recipe, read_index
from autoflux.models.values import Model
from autoflux.paths import cache_dir
from autoflux.units import GIB, format_bytes, parse_bytes

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

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)


class OpenPack:
    """A pack that nobody removes until it is closed, or forgotten."""

    def __init__(self, pack: Pack, folder: Path, shelf: Shelf, use: FileLock) -> None:
        self.pack = pack
        self.weights = folder / WEIGHTS
        self._shelf = shelf
        self._release = weakref.finalize(self, _let_go, use)

    def drop(self) -> None:
        """Close it and give it up as damaged: it is no pack any more, whoever else has it open."""
        self._release()
        self._shelf.drop(self.pack.key)

    def close(self) -> None:
        """Let others remove it."""
        self._release()


class Shelf:
    """All packs of this user."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir() / "packs"
        self._locks = self.root / "locks"

    def folder(self, key: str) -> Path:
        """Where the pack of that key is, or would be."""
        return self.root / key

    def packs(self) -> list[Pack]:
        """Those that are there, least recently used first."""
        found = []
        for folder in self.root.glob("[!.]*"):
            with contextlib.suppress(DamagedPack, OSError):
                found.append(((folder / INDEX).stat().st_mtime_ns, read_index(folder)))
        return [pack for _, pack in sorted(found, key=lambda entry: (entry[0], entry[1].key))]

    def find(self, key: str) -> Pack | None:
        """The pack of that key, if it is there and its index can be read."""
        try:
            return read_index(self.folder(key))
        except DamagedPack:
            return None

    def open(self, key: str) -> OpenPack | None:
        """The pack of that key, kept from removal; None if it is not there or cannot be kept."""
        if not (self.folder(key) / INDEX).is_file():
            return None
        try:
            with self._gate(key, OPEN_SECONDS):
                pack = self.find(key)
                if pack is None:
                    return None
                use = FileLock(self._locks / f"{key}.{uuid.uuid4().hex}.use", thread_local=False)
                use.acquire(timeout=0)
                os.utime(self.folder(key) / INDEX)
        except (Timeout, OSError):
            return None
        return OpenPack(pack, self.folder(key), self, use)

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
        with self._disk_errors(), self._gate(key, -1):
            if self.find(key):
                yield None
                return
            partial = self.root / f".{key}.partial"
            try:
                self._reserve(key, partial, nbytes)
                yield partial
                shutil.rmtree(self.folder(key), ignore_errors=True)
                partial.rename(self.folder(key))
                _flush_folder(self.root)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def remove(self, key: str) -> bool:
        """Delete a pack; False if somebody uses or makes it."""
        try:
            with self._gate(key, 0):
                if self._in_use(key):
                    return False
                self._unlink_index(key)
                shutil.rmtree(self.folder(key), ignore_errors=True)
                shutil.rmtree(self.root / f".{key}.partial", ignore_errors=True)
        except (Timeout, OSError):
            return False
        return not self.folder(key).exists()

    def of_model(self, place: Path) -> list[Pack]:
        """Those made from files in this folder, or from this file."""
        real = place.resolve()
        return [
            pack
            for pack in self.packs()
            if any(
                Path(file).is_relative_to(place) or Path(file).resolve().is_relative_to(real) for file in pack.sources
            )
        ]

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

    def drop(self, key: str) -> None:
        """Let a damaged pack not be taken for one any more; its bytes go once nobody reads them."""
        with contextlib.suppress(OSError):
            self._unlink_index(key)
        self.remove(key)

    def sweep(self, making: str = "") -> None:
        """Delete what was left by processes that were ended, and packs of other versions; not what is just `making`."""
        for folder in [*self.root.glob("[!.]*"), *self.root.glob(".*.partial")]:
            key = folder.name.removeprefix(".").removesuffix(".partial")
            unfinished = folder.name != key or self.find(key) is None
            if folder.is_dir() and folder != self._locks and key != making and unfinished:
                self.remove(key)

    @property
    def used_bytes(self) -> int:
        """What packs take, and those that are being made."""
        files = (*self.root.glob(f"*/{WEIGHTS}"), *self.root.glob(f".*.partial/{WEIGHTS}"))
        return sum(file.stat().st_size for file in files if file.exists())

    def _reserve(self, key: str, partial: Path, nbytes: int) -> None:
        # One after the other, so that two do not both take what room there is.
        with FileLock(self._locks / "room.lock"):
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
        limit = limit_bytes(self.root)
        if nbytes > limit:
            raise DiskFull(
                f"the pack would take {format_bytes(nbytes)}, and packs may take {format_bytes(limit)}",
                hint=f"raise {LIMIT}",
            )
        for pack in self.packs():
            if self.used_bytes + nbytes <= limit:
                break
            self.remove(pack.key)
        if self.used_bytes + nbytes > limit:
            raise DiskFull(
                f"the pack would take {format_bytes(nbytes)}, and the others, which are in use, leave "
                f"{format_bytes(max(0, limit - self.used_bytes))} of {format_bytes(limit)}",
                hint=f"end what uses them, or raise {LIMIT}",
            )
        free = shutil.disk_usage(self.root).free
        if free < nbytes + LEFT_FREE_BYTES:
            raise DiskFull(
                f"the pack would take {format_bytes(nbytes)}, and {format_bytes(free)} are free at {str(self.root)!r}",
                hint="make room, or set AUTOFLUX_CACHE_DIR to a folder on another disk",
            )

    def _gate(self, key: str, timeout_seconds: float) -> FileLock:
        self._locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self._locks / f"{key}.lock", timeout=timeout_seconds)

    def _in_use(self, key: str) -> bool:
        for file in self._locks.glob(f"{key}.*.use"):
            try:
                with FileLock(file, timeout=0):
                    pass
            except Timeout:
                return True
            # Its process has ended without a word.
            file.unlink(missing_ok=True)
        return False

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
    """How many bytes all packs may take: `AUTOFLUX_PACK_LIMIT` (0 for none), else 120 GiB or a quarter of the disk.

    Raises:
        UsageError: the variable is not a size.
    """
    if said := os.environ.get(LIMIT):
        return 0 if said.strip() == "0" else parse_bytes(said)
    return min(USUAL_LIMIT_BYTES, shutil.disk_usage(root).total // USUAL_SHARE)


def packs_wanted() -> bool:
    """Whether packs may be used: not with `--no-pack`, which sets `AUTOFLUX_NO_PACK`."""
    return os.environ.get(NO_PACK, "") in ("", "0")


def flush(file: Path) -> None:
    """Wait until what was written is on the disk."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # Windows cannot open folders.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _let_go(use: FileLock) -> None:
    use.release(force=True)
    Path(use.lock_file).unlink(missing_ok=True)
