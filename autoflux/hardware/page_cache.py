"""The system's cache of files: what is read comes into it, and can be dropped where the system lets us."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from autoflux.units import MIB

CAN_DROP = hasattr(os, "posix_fadvise")
_READ_BYTES = 16 * MIB


def read_all(files: Iterable[Path]) -> int:
    """Read every byte into one piece of memory that is used again and again; returns how many there are.

    Raises:
        OSError: a file cannot be read.
    """
    memory, done = bytearray(_READ_BYTES), 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(memory):
                done += count
    return done


def drop(files: Iterable[Path]) -> None:
    """Have the next one who reads these files read them from the disk. Only where `CAN_DROP`.

    Raises:
        OSError: a file cannot be opened, or not be written out.
    """
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what has just been written stays in the cache until it is on the disk
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
