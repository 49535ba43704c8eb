"""Files that threads read into the page cache: while libraries are imported, and for the next start."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from autoflux.hardware.host import read as read_host
from autoflux.runtime.priority import lower_priority
from autoflux.units import MIB

KNOWS_WHAT_IS_CACHED = sys.platform == "linux" and hasattr(os, "RWF_NOWAIT")

FILL_STEP = 8 * MIB
"""What is read at once when there is time."""

AHEAD_STEP = 64 * MIB
"""The same while libraries are imported. A thread waits for its turn to compute three times for each piece, up to 5 ms
each time: a disk of 1.4 GB/s reads 8 MB in less."""

CACHE_SHARE = 2
"""The page cache is filled only if available RAM is so many times what is to be put there."""

READERS_AHEAD = 4
"""Threads that read ahead. Each waits for its turn to compute after every piece, so that one alone leaves the disk idle
while others compute, as importing does."""


class _Piece(NamedTuple):
    """Bytes `begin` to `end` of a file."""

    path: Path
    begin: int
    end: int


class Filling:
    """Files on their way into the page cache, in order, by threads that end with the process.

    What else wants the memory gets it: what is only cached is given up at once.
    """

    def __init__(
        self, files: Sequence[Path], *, threads: int = 1, yields: bool = False, step_bytes: int = FILL_STEP
    ) -> None:
        """`yields` says that everything else goes first."""
        self._step_bytes = step_bytes
        self._pieces = _pieces(files, step_bytes)
        self._lock = threading.Lock()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._read, args=(yields,), name="fill-cache", daemon=True)
            for _ in range(threads if files else 0)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Begin no other piece."""
        self._stopped = True

    def join(self) -> None:
        """Wait until all is read, or what was begun when it was stopped."""
        for thread in self._threads:
            thread.join()

    def _read(self, yields: bool) -> None:  # noqa: FBT001 — a thread's argument
        if yields:
            lower_priority()
        memory = bytearray(self._step_bytes)
        while piece := self._next():
            with contextlib.suppress(OSError):  # who needs the file says what is wrong with it
                _read_piece(piece, memory)

    def _next(self) -> _Piece | None:
        with self._lock:
            return None if self._stopped else next(self._pieces, None)


def is_cached(descriptor: int, begin: int, end: int) -> bool:
    """Whether the first and the last byte are in the page cache: what is read at once has come there at once."""
    byte = memoryview(bytearray(1))
    try:
        return all(os.preadv(descriptor, [byte], at, os.RWF_NOWAIT) for at in (begin, end - 1))
    except OSError:
        return False


def fill_page_cache(paths: Sequence[Path]) -> Filling:
    """Read these files into the page cache for the next start, when nothing else wants to compute.

    Nothing happens if there is no room for them, or if they were not read past it.
    """
    return Filling(paths if has_room(paths) else (), yields=True)


def read_ahead(paths: Sequence[Path]) -> Filling:
    """Read these files into the page cache as fast as the disk gives them, until it is stopped, if there is room."""
    return Filling(paths if has_room(paths) else (), threads=READERS_AHEAD, step_bytes=AHEAD_STEP)


def has_room(paths: Sequence[Path]) -> bool:
    """Whether the page cache may be filled with these files."""
    if not KNOWS_WHAT_IS_CACHED:
        return False
    nbytes = sum(path.stat().st_size for path in paths if path.exists())
    return nbytes > 0 and read_host().available_bytes.value >= CACHE_SHARE * nbytes


def _pieces(files: Sequence[Path], step_bytes: int) -> Iterator[_Piece]:
    for path in files:
        with contextlib.suppress(OSError):
            nbytes = path.stat().st_size
            yield from (_Piece(path, at, min(at + step_bytes, nbytes)) for at in range(0, nbytes, step_bytes))


def _read_piece(piece: _Piece, memory: bytearray) -> None:
    with piece.path.open("rb", buffering=0) as file:
        if not is_cached(file.fileno(), piece.begin, piece.end):
            os.preadv(file.fileno(), [memory], piece.begin)
