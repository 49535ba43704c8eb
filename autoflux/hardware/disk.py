"""The file system that models lie on: free space, and how fast a large file is read that is not in RAM yet."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autoflux.errors import OutputUnwritable
from autoflux.files import check_writable
from autoflux.hardware.values import Disk, Figure, Problem, Size, Source
from autoflux.units import GB, MIB, format_bytes

SAMPLE_BYTES = 256 * MIB
"""Large enough that a fast disk (7 GB/s) reads for tens of milliseconds, small enough to write on a slow one."""

READ_BYTES = 16 * MIB
LEAST_FREE_BYTES = 2 * GB


def models_folder() -> Path:
    """Where downloaded models usually lie: Hugging Face's cache."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def existing(path: Path) -> Path:
    """`path` if it is a folder, else the nearest folder above it that exists."""
    # `os.path`: it takes a user without a home and folders one may not look into, where `Path` raises.
    try:
        path = Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111
    except OSError:  # the working directory was deleted
        return Path(path.anchor or os.sep)
    return next((folder for folder in (path, *path.parents) if os.path.isdir(folder)), path)  # noqa: PTH112


def read(path: Path | None) -> Disk:
    """The file system around `path` without measuring it."""
    folder = existing(path or models_folder())
    try:
        free = Size(value=shutil.disk_usage(folder).free, source=Source.REPORTED)
    except OSError as error:
        free = Size(value=0, source=Source.ASSUMED, note=f"not told: {error.strerror or error}")
    return Disk(path=str(folder), free_bytes=free)


def measure(disk: Disk, sample_bytes: int = SAMPLE_BYTES, beside: Iterable[Path] = ()) -> tuple[Disk, list[Problem]]:
    """Write a temporary file, read it past the page cache, delete it; with a problem instead where that cannot be.

    The file goes into the first folder of `beside` on the same file system, so that nothing is written among models
    unless there is no other way.
    """
    if disk.free_bytes.value < LEAST_FREE_BYTES:
        return disk, [_not_measured(disk, f"only {format_bytes(disk.free_bytes.value)} are free")]
    try:
        with _sample_file(_sample_folder(Path(disk.path), beside), sample_bytes) as path:
            rate = read_rate(path, sample_bytes)
    except (OSError, OutputUnwritable, ValueError) as error:
        return disk, [_not_measured(disk, str(error))]
    return disk.replace(read_gb_per_s=rate), []


def is_same(one: Path, other: Path) -> bool:
    """Whether both folders lie on one file system; a folder that is not there lies on none."""
    try:
        return one == other or one.stat().st_dev == other.stat().st_dev
    except OSError:
        return False


def _sample_folder(folder: Path, beside: Iterable[Path]) -> Path:
    """Raises OutputUnwritable when nothing on this file system can be written."""
    for other in (existing(path) for path in beside):
        with contextlib.suppress(OutputUnwritable):
            if is_same(folder, other):
                check_writable(other)
                return other
    check_writable(folder)
    return folder


def read_rate(path: Path, size: int) -> Figure:
    """Rate of reading the whole file from the disk, in 10^9 bytes a second."""
    descriptor, note = _open_uncached(path)
    try:
        with mmap.mmap(-1, READ_BYTES) as buffer:  # page-aligned, as direct reading needs it
            started = time.perf_counter()
            count = _read_all(descriptor, buffer)
            seconds = time.perf_counter() - started
    finally:
        os.close(descriptor)
    if count != size or seconds <= 0:
        raise ValueError(f"read {count} of {size} bytes")
    return Figure(value=count / seconds / 1e9, source=Source.MEASURED, note=note)


def _open_uncached(path: Path) -> tuple[int, str]:
    if hasattr(os, "O_DIRECT"):
        try:
            return _direct(path), "read past the page cache"
        except OSError:  # tmpfs and some network file systems refuse
            pass
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    return descriptor, _drop_cache(descriptor)


def _direct(path: Path) -> int:
    """Open for reading past the page cache; some file systems refuse only when it comes to reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            os.readv(descriptor, [page])
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _drop_cache(descriptor: int) -> str:
    if sys.platform == "darwin":
        import fcntl  # noqa: PLC0415 — not on Windows

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return "read past the file cache"
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return "read after dropping the page cache"
    return "may come from the file cache"


def _read_all(descriptor: int, buffer: mmap.mmap) -> int:
    total = 0
    if hasattr(os, "readv"):
        while count := os.readv(descriptor, [buffer]):
            total += count
        return total
    while data := os.read(descriptor, READ_BYTES):
        total += len(data)
    return total


@contextmanager
def _sample_file(folder: Path, size: int) -> Iterator[Path]:
    """A file of random bytes (file systems compress zeros away), on the disk, deleted whatever happens."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".autoflux-probe-")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _fill(file.fileno(), size)
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _fill(descriptor: int, size: int) -> None:
    chunk = os.urandom(min(size, READ_BYTES))
    written = 0
    while written < size:
        written += os.write(descriptor, chunk[: size - written])


def _not_measured(disk: Disk, reason: str) -> Problem:
    return Problem(
        subject="disk",
        message=f"the read rate of {disk.path!r} was not measured: {reason}",
        hint="free some space, or name another folder of models",
    )
