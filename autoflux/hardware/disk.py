"""The file system that models lie on: free space, and how fast a large file is read that is not in RAM yet."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autoflux.errors import OutputUnwritable
from autoflux.files import check_writable
from autoflux.hardware.values import Disk, Figure, Problem, Size, Source
from autoflux.paths import expanded
from autoflux.units import GB, MIB, format_bytes

SAMPLE_BYTES = 256 * MIB
"""Large enough that a fast disk (7 GB/s) reads for tens of milliseconds, small enough to write on a slow one."""

READ_BYTES = 16 * MIB
LEAST_FREE_BYTES = 2 * GB

READ_SECONDS = 1.5
WRITE_SECONDS = 1.5
"""Nothing more is read, or written into the sample, after this; a hard disk reads and writes some 200 MB in it."""

LOOKED_AT = 5_000
"""Files and folders among the models that are looked at in search of a large one."""

WEIGHTS = (".safetensors", ".sft", ".gguf", ".bin", ".ckpt", ".pt", ".pth")
BLOBS = "blobs"
"""Hugging Face's cache keeps files without an ending in folders of this name."""


def models_folder() -> Path:
    """Where downloaded models usually lie: Hugging Face's cache."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def existing(path: Path) -> Path:
    """`path` if it is a folder, else the nearest folder above it that exists."""
    # `os.path`: it takes folders one may not look into, where `Path` raises.
    try:
        path = Path(os.path.abspath(expanded(path)))  # noqa: PTH100
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
    """Read the largest file of the models, or else a sample, past the page cache; a problem where that cannot be.

    A sample is written only if no file among the models is as large, and deleted. It goes into the first folder of
    `beside` on the same file system, so that nothing is written among models unless there is no other way.
    """
    model = large_file(Path(disk.path), sample_bytes)
    try:
        rate = read_rate(model, sample_bytes) if model else _sample_rate(disk, sample_bytes, beside)
    except (OSError, OutputUnwritable, ValueError) as error:
        return disk, [_not_measured(disk, str(error))]
    return disk.replace(read_gb_per_s=rate), []


def _sample_rate(disk: Disk, sample_bytes: int, beside: Iterable[Path]) -> Figure:
    if disk.free_bytes.value < LEAST_FREE_BYTES:
        raise ValueError(f"only {format_bytes(disk.free_bytes.value)} are free")
    with _sample_file(_sample_folder(Path(disk.path), beside), sample_bytes) as path:
        return read_rate(path, sample_bytes)


def large_file(folder: Path, least_bytes: int) -> Path | None:
    """The largest file of weights in `folder` and below, on the same file system; None if none has that size."""
    best: tuple[int, Path] | None = None
    for path in itertools.islice(_below(folder), LOOKED_AT):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if found.st_size >= max(least_bytes, best[0] if best else 0) and _is_readable(path, found, folder):
                best = found.st_size, path
    return best[1] if best else None


def _is_readable(path: Path, found: os.stat_result, folder: Path) -> bool:
    """Whether it holds weights and lies on this file system. One with holes would be read from nowhere."""
    if path.suffix not in WEIGHTS and path.parent.name != BLOBS:
        return False
    whole = getattr(found, "st_blocks", found.st_size) * 512 >= found.st_size
    return stat.S_ISREG(found.st_mode) and whole and is_same(path, folder) and os.access(path, os.R_OK)


def _below(folder: Path) -> Iterator[Path]:
    for above, folders, files in os.walk(folder):
        yield from (Path(above, name) for name in (*folders, *files))  # folders too, for they cost time as well


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
    """Rate of reading from the disk, in 10^9 bytes a second: `size` bytes of the file, or as many as the time allows.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    descriptor, note = _open_uncached(path, size)
    try:
        with mmap.mmap(-1, READ_BYTES) as buffer:  # page-aligned, as direct reading needs it
            started = time.perf_counter()
            count = _read(descriptor, buffer, size)
            seconds = time.perf_counter() - started
    finally:
        os.close(descriptor)
    if not count or seconds <= 0:
        raise ValueError(f"nothing could be read of {str(path)!r}")
    return Figure(value=count / seconds / 1e9, source=Source.MEASURED, note=f"{format_bytes(count)} {note}")


def _open_uncached(path: Path, size: int) -> tuple[int, str]:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    # Even before reading directly: some file systems take that for a wish and look into the cache.
    note = _drop_cache(descriptor)
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # tmpfs and some network file systems refuse
            direct = _direct(path)
            os.close(descriptor)
            return direct, "read past the page cache"
    if cached := cached_share(descriptor, size):
        note = f"read while {cached:.0%} were in RAM, so the disk may be slower"
    return descriptor, note


def cached_share(descriptor: int, size: int) -> float:
    """How much of the first `size` bytes is in the page cache, by 16 samples; 0 where the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 0.0
    # Asking makes the system read: with this the page alone, else many after it.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    share = sum(_is_cached(descriptor, size * part // 16) for part in range(16)) / 16
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
    return share


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except OSError:  # it would have to be read from the disk; or the file system knows no such question
        return False


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


def _read(descriptor: int, buffer: mmap.mmap, size: int) -> int:
    total = 0
    end = time.perf_counter() + READ_SECONDS
    while total < size and time.perf_counter() < end:
        count = os.readv(descriptor, [buffer]) if hasattr(os, "readv") else len(os.read(descriptor, READ_BYTES))
        if not count:
            break
        total += count
    return total


@contextmanager
def _sample_file(folder: Path, size: int) -> Iterator[Path]:
    """A file of random bytes (file systems compress zeros away), on the disk, deleted whatever happens."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".autoflux-probe-")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _fill(file.fileno(), size)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _fill(descriptor: int, size: int) -> None:
    chunk = os.urandom(min(size, READ_BYTES))
    written = 0
    end = time.perf_counter() + WRITE_SECONDS
    while written < size and (not written or time.perf_counter() < end):
        written += os.write(descriptor, chunk[: size - written])
        os.fsync(descriptor)  # each time, or the time would be up only once all of it waits in RAM


def _not_measured(disk: Disk, reason: str) -> Problem:
    return Problem(
        subject="disk",
        message=f"the read rate of {disk.path!r} was not measured: {reason}",
        hint="free some space, or name another folder of models",
    )
