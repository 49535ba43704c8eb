"""Reading files that users name, and writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from autoflux.errors import DamagedFile, OutputUnwritable, UsageError
from autoflux.paths import expanded

MAX_READ_BYTES = 32 * 2**20
"""More than any plan, probe or profile; a larger file is another kind of file, such as weights."""


def is_there(path: Path) -> bool:
    """Whether anything is there; what cannot be the name of a file, such as one too long, is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_text(path: Path) -> bool:
    """Whether a path is valid text, as names of files need not be on Linux; JSON has no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(path: Path) -> None:
    """Refuse a path that could be written neither into JSON nor into plans and packs.

    Raises:
        UsageError: it is not UTF-8.
    """
    if not is_text(path):
        raise UsageError(f"the path {str(path)!r} is not valid text", hint="rename it to a name in UTF-8")


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
        return expanded(text).exists() or any(mark in text for mark in "/\\.")
    except (OSError, ValueError):
        return True


def write_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename it into place.

    The file gets the permissions `mode`, at no moment more; without it those that new files get.

    Raises:
        OutputUnwritable: the folder is missing, read-only or full; `path` is as it was before.
    """
    with _written_beside(path, data, mode) as temporary:
        temporary.replace(path)


def write_new(path: Path, data: bytes) -> Path:
    """Write `data` as `write_atomic` under a name that nothing has: `path`, else `name-2`, `name-3`, …; gives the name.

    Of several processes that do so at once each gets a name of its own.

    Raises:
        OutputUnwritable: the folder is missing, read-only or full; nothing is left behind.
    """
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    with _written_beside(path, data) as temporary:
        return next(free for free in itertools.chain([path], numbered) if _is_placed(temporary, free))


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes, mode: int | None = None) -> Iterator[Path]:
    """A file beside `path` with that content, until the end of the context; errors in there are about `path`."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".autoflux-")
    except OSError as error:
        raise _unwritable(path, path.parent, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask() if mode is None else mode)
        yield temporary
    except OSError as error:
        raise _unwritable(path, path.parent, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _is_placed(temporary: Path, free: Path) -> bool:
    """Give the file that name as well; False if something has it."""
    try:
        os.link(temporary, free)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            free.touch(exist_ok=False)
        except FileExistsError:
            return False
        temporary.replace(free)
    return True


def read_text(path: Path, what: str) -> str:
    """The text of a file that a user wrote, with the mark of byte order that some editors begin it with or without.

    Raises:
        DamagedFile: as `read_small`, or it is not UTF-8; `what` it is goes into the message.
    """
    try:
        return read_small(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"the {what} {str(path)!r} cannot be read: {error}", hint="save it as UTF-8") from error


def check_target(path: Path) -> None:
    """Find out before the work, not after it, whether `write_atomic` can write `path`.

    Raises:
        OutputUnwritable: a folder or a device is there, the name cannot be one, or the folder cannot be written.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            what = "a folder" if path.is_dir() else "no regular file"
            raise OutputUnwritable(f"cannot write {str(path)!r}: {what} is there", hint="choose another name")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise _unwritable(path, path.parent, error) from error
    check_writable(path.parent)


def followed(path: Path) -> Path:
    """What a link leads to, which is written instead of the link; of anything else the path itself."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114 — the other raises


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


def flush(file: Path) -> None:
    """Wait until what was written is on the disk."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """The same for what was renamed there; Windows cannot open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(path: Path, folder: Path, error: OSError | ValueError) -> OutputUnwritable:
    code, reason = getattr(error, "errno", 0), getattr(error, "strerror", None) or error
    hints = {errno.ENOENT: f"create the folder {str(folder)!r} first", errno.ENAMETOOLONG: "choose a shorter name"}
    return OutputUnwritable(f"cannot write {str(path)!r}: {reason}", hint=hints.get(code, "choose another place"))
