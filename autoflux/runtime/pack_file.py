"""Reading a pack's file at the speed of the disk: from the page cache what is there, and the rest past it.

What is read through the page cache comes into memory twice, into the cache and from there to its place, and new memory
is not free: on virtual machines, where the host gives each page at its first touch, it can take longer than the disk.
So what is needed once and is not cached goes past the cache into a small piece of memory that is used again and again.
The cache is filled afterwards, when nobody waits for it, so that the next start reads nothing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from autoflux.hardware.host import read as read_host
from autoflux.runtime.priority import lower_priority
from autoflux.units import MIB

PAGE = mmap.PAGESIZE
"""What reads past the cache begin and end at; disks ask for 512 or 4096 bytes."""

READS_PAST_CACHE = sys.platform == "linux" and hasattr(os, "RWF_NOWAIT")

FILL_STEP = 8 * MIB

CACHE_SHARE = 2
"""The page cache is filled only if available RAM is so many times what is to be put there."""


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
        self._own = threading.local()
        self._lock = threading.Lock()

    def read(self, first: int, end: int) -> memoryview:
        """Bytes `first` to `end`, until the same thread reads again.

        Raises:
            OSError: the file cannot be read.
            EOFError: it ends before.
        """
        begin = first // PAGE * PAGE
        memory = self._memory(end - begin)
        if (
            not self._reads_past_cache
            or is_cached(self._file.fileno(), begin, end)
            or not self._fill_past_cache(memory, begin, end)
        ):
            self._fill(self._file.fileno(), memory, begin, end)
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


def is_cached(descriptor: int, begin: int, end: int) -> bool:
    """Whether the first and the last byte are in the page cache: what is read at once has come there at once."""
    byte = memoryview(bytearray(1))
    try:
        return all(os.preadv(descriptor, [byte], at, os.RWF_NOWAIT) for at in (begin, end - 1))
    except OSError:
        return False


def fill_page_cache(paths: Sequence[Path]) -> threading.Thread | None:
    """Read these files into the page cache, in a thread that ends with the process; None if there is no room for them,
    or if they were not read past it.

    What else wants the memory gets it: what is only cached is given up at once.
    """
    nbytes = sum(path.stat().st_size for path in paths if path.exists())
    if not nbytes or not READS_PAST_CACHE or read_host().available_bytes.value < CACHE_SHARE * nbytes:
        return None
    thread = threading.Thread(target=_read_through, args=(list(paths),), name="fill-cache", daemon=True)
    thread.start()
    return thread


def _read_through(paths: Sequence[Path]) -> None:
    lower_priority()
    memory = bytearray(FILL_STEP)
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            for at in range(0, path.stat().st_size, FILL_STEP):
                end = min(at + FILL_STEP, path.stat().st_size)
                if not is_cached(file.fileno(), at, end):
                    os.preadv(file.fileno(), [memory], at)


def _open_direct(path: Path) -> int | None:
    """A descriptor that reads past the page cache; None where there is no such thing."""
    if not READS_PAST_CACHE:
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
