"""Reading files that users name, and writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from autoflux.errors import DamagedFile, OutputUnwritable

MAX_READ_BYTES = 32 * 2**20
"""More than any plan, probe or profile; a larger file is another kind of file, such as weights."""


def is_there(path: Path) -> bool:
    """Whether anything is there; what cannot be the name of a file, such as one too long, is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_small(path: Path) -> bytes:
    """The whole of a file that a user named.

    Raises:
        DamagedFile: it is not there, cannot be read, or is far too large for what is read so.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_READ_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DamagedFile(f"cannot read {str(path)!r}: {reason}", hint="check the path") from error
    if len(data) > MAX_READ_BYTES:
        raise DamagedFile(f"{str(path)!r} is larger than {MAX_READ_BYTES // 2**20} MiB", hint="check the path")
    return data


def is_path(text: str) -> bool:
    """Whether a text that may be a name or a path is meant as a path: it is there, or looks like one."""
    try:
        return Path(text).expanduser().exists() or any(mark in text for mark in "/\\.")
    except (OSError, ValueError, RuntimeError):
        return True


def write_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename it into place.

    The file gets the permissions `mode`, at no moment more; without it those that new files get.

    Raises:
        OutputUnwritable: the folder is missing, read-only or full; `path` is as it was before.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, path.parent, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask() if mode is None else mode)
        Path(temporary).replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise _unwritable(path, path.parent, error) from error
        raise


def check_writable(folder: Path) -> None:
    """Find out before the work, not after it, whether a file can be created in `folder`.

    Raises:
        OutputUnwritable: it cannot; nothing is left behind.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, folder, error) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(path: Path, folder: Path, error: OSError) -> OutputUnwritable:
    hint = f"create the folder {str(folder)!r} first" if not folder.is_dir() else "choose another place"
    return OutputUnwritable(f"cannot write {str(path)!r}: {error.strerror or error}", hint=hint)
