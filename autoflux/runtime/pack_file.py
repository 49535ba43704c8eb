"""Reading a pack's file at the speed of the disk: from the page cache, past it or through it, as is fastest.

What is read through the page cache comes into memory twice, into the cache and from there to its place, and new memory
is not free: on virtual machines, where the host gives each page at its first touch, it can take longer than the disk.
Past the cache it goes into a small piece of memory that is used again and again, but there are disks that give it a
third slower that way (1.0 GB/s instead of 1.5, on the machine of one H200). So of what is needed once the first pieces
are read in both ways, and the rest in the faster one; past the cache if there is no room in it. It is filled
afterwards, when nobody waits for it, so that the next start reads nothing (`cache_filling`).
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import xxhash

from autoflux.errors import DamagedPack, UnreadablePack
from autoflux.models.pack_shelf import OpenPack, Shelf, packs_wanted
from autoflux.models.values import Component
from autoflux.planning.packs import recipe_for
from autoflux.planning.values import ComponentPlan
from autoflux.runtime.cache_filling import KNOWS_WHAT_IS_CACHED, has_room, is_cached
from autoflux.units import MIB

PAGE = mmap.PAGESIZE
"""What reads past the cache begin and end at; disks ask for 512 or 4096 bytes."""

SAMPLE_BYTES = 256 * MIB
"""What is read in each way before the faster is taken: a quarter of a second of a disk of 1 GB/s."""

_log = logging.getLogger(__name__)


def checksum(data: bytes | memoryview) -> int:
    """Of a piece: XXH3 of 64 bits, which misses one change of 2**64, if nobody made it on purpose.

    35 GB/s on one core of an EPYC, other threads running meanwhile; CRC-32 of Python's own library 3.9, which took two
    thirds of the time in which packs came from the page cache; SHA-256 1.8.
    """
    return xxhash.xxh3_64_intdigest(data)


class Stretch(Protocol):
    """Bytes of a file."""

    @property
    def first(self) -> int: ...

    @property
    def length(self) -> int: ...


S = TypeVar("S", bound=Stretch)


def side_by_side(stretches: Iterable[S], most_bytes: int) -> Iterator[list[S]]:
    """Stretches together as far as one read of so many bytes takes them; best in the order of the file."""
    held: list[S] = []
    for stretch in stretches:
        far = held and stretch.first + stretch.length - held[0].first > most_bytes
        if held and (far or not held[0].first <= stretch.first <= held[-1].first + held[-1].length):
            yield held
            held = []
        held.append(stretch)
    if held:
        yield held


class Pace:
    """How fast a disk has been read past the page cache and through it, by threads that do both meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nbytes = {True: 0, False: 0}
        self._seconds = {True: 0.0, False: 0.0}

    def is_past_cache(self) -> bool:
        """How to read next: as was tried less, until both are known, and then as was faster."""
        with self._lock:
            past, through = self._nbytes[True], self._nbytes[False]
            if min(past, through) < SAMPLE_BYTES:
                return past <= through
            return past * self._seconds[False] > through * self._seconds[True]

    def took(self, nbytes: int, seconds: float, *, past_cache: bool) -> None:
        """Note a read of one thread."""
        with self._lock:
            self._nbytes[past_cache] += nbytes
            self._seconds[past_cache] += seconds


_PACES: dict[int, Pace] = {}
"""By the number of the device that a file system is on."""


class PackFile:
    """An open file; `read` may be called from several threads at once.

    Example::

        file = PackFile(path, once=True)
        header = bytes(file.read(0, 4096))
        file.close()
    """

    def __init__(self, path: Path, *, once: bool) -> None:
        """`once` says that nothing is to be read a second time.

        Raises:
            OSError: it cannot be opened.
        """
        self._file = path.open("rb", buffering=0)
        self._direct = _open_direct(path) if once else None
        self._reads_past_cache = self._direct is not None
        disk = os.fstat(self._file.fileno()).st_dev
        self._pace = _PACES.setdefault(disk, Pace()) if self._reads_past_cache and has_room([path]) else None
        self._own = threading.local()
        self._lock = threading.Lock()

    def read(self, first: int, end: int, into: memoryview | None = None) -> memoryview:
        """Bytes `first` to `end`, until the same thread reads again; or in `into`, which begins at a page and has room
        for two more.

        Raises:
            OSError: the file cannot be read.
            EOFError: it ends before.
        """
        begin = first // PAGE * PAGE
        memory = self._memory(end - begin) if into is None else into[: -(-(end - begin) // PAGE) * PAGE]
        if not self._reads_past_cache or is_cached(self._file.fileno(), begin, end):
            self._fill(self._file.fileno(), memory, begin, end)
        else:
            self._fill_from_disk(memory, begin, end)
        return memory[first - begin : end - begin]

    def close(self) -> None:
        """Nothing is read any more."""
        self._file.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _memory(self, nbytes: int) -> memoryview:
        """Whole pages, the same for each read of a thread if they are enough."""
        needed = -(-nbytes // PAGE) * PAGE
        kept: mmap.mmap | None = getattr(self._own, "pages", None)
        if kept is None or len(kept) < needed:
            kept = self._own.pages = mmap.mmap(-1, needed)
        return memoryview(kept)[:needed]

    def _fill_from_disk(self, memory: memoryview, begin: int, end: int) -> None:
        wanted = self._pace is None or self._pace.is_past_cache()
        began = time.perf_counter()
        past_cache = wanted and self._fill_past_cache(memory, begin, end)
        if not past_cache:
            self._fill(self._file.fileno(), memory, begin, end)
        if self._pace:
            self._pace.took(end - begin, time.perf_counter() - began, past_cache=past_cache)

    def _fill_past_cache(self, memory: memoryview, begin: int, end: int) -> bool:
        assert self._direct is not None  # noqa: S101
        try:
            self._fill(self._direct, memory, begin, end)
        except OSError:  # a file system without, or a disk with larger sectors
            self._reads_past_cache = False
            return False
        return True

    def _fill(self, descriptor: int, memory: memoryview, begin: int, end: int) -> None:
        done = 0
        while begin + done < end:
            # Only at the end of the file is it no whole number of pages.
            count = self._read_at(descriptor, memory[done:], begin + done)
            if count == 0:
                raise EOFError
            done += count

    def _read_at(self, descriptor: int, memory: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [memory], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(memory) or 0


def _open_direct(path: Path) -> int | None:
    """A descriptor that reads past the page cache; None where there is no such thing."""
    if not KNOWS_WHAT_IS_CACHED:
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None


def open_pack(component: Component, planned: ComponentPlan) -> OpenPack | None:
    """The pack with a component's weights as they are planned; None if there is none, or none is wanted.

    One that is not what was written is dropped and told, since the start takes longer without it than it should; one
    that cannot be read now stays.
    """
    recipe = recipe_for(component, planned) if packs_wanted() else None
    if recipe is None:
        return None
    shelf, key = Shelf(), recipe.key()
    try:
        return shelf.open(key)
    except UnreadablePack:
        return None
    except DamagedPack as error:
        shelf.drop(key, only_remains=True)
        _log.warning("%s; it was dropped, and the model's own files are read instead", error.message)
        return None
