"""Downloading one file: resumed at any byte, verified, and visible only when it is whole."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import httpx

from autoflux.errors import AutofluxError, DamagedDownload, DiskFull, OutputUnwritable
from autoflux.models.hubs.checksums import Checksum
from autoflux.models.hubs.transport import Passing, Wire, explain, raise_if_passing
from autoflux.models.hubs.values import RemoteFile
from autoflux.units import counted

Refuse = Callable[[httpx.Response], None]
OnBytes = Callable[[int], None]
"""Called with the bytes that a file has gained; less than zero when bytes turned out worthless."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def fetch(wire: Wire, url: str, file: RemoteFile, partial: Path, refuse: Refuse, on_bytes: OnBytes) -> None:
    """Bring `partial` to the verified content of `file`, from whatever it holds now.

    Args:
        wire: the hub.
        url: where the file is.
        file: what the hub said of it.
        partial: where bytes gather; kept at every failure that another run can go on from.
        refuse: raises what a status means that no further try will change.
        on_bytes: told of the bytes gained; those found in `partial` count.

    Raises:
        DamagedDownload: the content is not what the hub promised, twice.
        HubUnavailable: the hub stopped answering.
        DiskFull: no room; what has arrived stays.
        Stopped: called off.
    """
    for _ in range(2):
        checksum = Checksum(file)
        fill = _Filling(wire, url, file, partial, refuse, on_bytes, checksum)
        wire.retrying(fill.attempt)
        # Another size than what was counted: someone else has written there as well, on a disk without working locks.
        if checksum.matches and partial.stat().st_size == file.size_bytes:
            return
        on_bytes(-file.size_bytes)
        partial.unlink(missing_ok=True)
    raise DamagedDownload(
        f"{file.path!r} arrived twice with the {checksum.kind} {checksum.value}, but should have "
        f"{checksum.expected}; it was deleted",
        hint="try again later, or take the model from the other hub with --source",
    )


class _Filling:
    """One file on its way. `done` bytes of it are on the disk and in the checksum."""

    def __init__(
        self,
        wire: Wire,
        url: str,
        file: RemoteFile,
        partial: Path,
        refuse: Refuse,
        on_bytes: OnBytes,
        checksum: Checksum,
    ) -> None:
        self._wire = wire
        self._url = url
        self._file = file
        self._partial = partial
        self._refuse = refuse
        self._on_bytes = on_bytes
        self._checksum = checksum
        self._done = 0
        self._recall()

    def _recall(self) -> None:
        """Count in what an earlier run left. A link in its place is not followed, and too much cannot be right."""
        try:
            if self._partial.is_symlink() or self._partial.stat().st_size > self._file.size_bytes:
                self._partial.unlink()
                return
            self._done = self._checksum.feed_file(self._partial, self._count)
        except FileNotFoundError:
            return

    def _count(self, count: int) -> None:
        self._wire.check()
        self._on_bytes(count)

    def attempt(self) -> None:
        """Ask for the missing bytes once. Raises Passing when fewer came."""
        if self._done == self._file.size_bytes:
            self._partial.touch()
            return
        before = self._done
        try:
            self._ask()
        except httpx.TransportError as error:
            raise Passing(explain(error), progressed=self._done > before) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._wire.unavailable(f"cannot be asked for {self._file.path!r}: {error}") from error
        except OSError as error:
            _raise_disk_error(self._partial, error)
        if self._done < self._file.size_bytes:
            raise Passing(f"sent too little of {self._file.path!r}", progressed=self._done > before)

    def _ask(self) -> None:
        ranged = {"Range": f"bytes={self._done}-"} if self._done else {}
        with self._wire.client.stream("GET", self._url, headers={**self._wire.headers, **ranged}) as response:
            raise_if_passing(response)
            self._refuse(response)
            skip = self._skip(response)
            with _open_to_append(self._partial) as target:
                # Pieces as they arrive: httpx gathers larger ones in memory, and loses them when the connection breaks.
                for chunk in _without_first(skip, response.iter_raw()):
                    self._add(chunk, target)

    def _skip(self, response: httpx.Response) -> int:
        """How many bytes of the answer are here already; a server that ignores ranges sends the file from its start."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Passing(f"sent {self._file.path!r} compressed, which was not asked for")
        if response.status_code == 200:
            return self._done
        if response.status_code == 206 and (found := _RANGE.fullmatch(response.headers.get("Content-Range", ""))):
            start, total = int(found[1]), found[3]
            if start <= self._done and total in ("*", str(self._file.size_bytes)):
                return self._done - start
        raise Passing(f"answered {response.status_code} with another part of {self._file.path!r} than asked for")

    def _add(self, chunk: bytes, target: BinaryIO) -> None:
        self._wire.check()
        if self._done + len(chunk) > self._file.size_bytes:
            self._partial.unlink(missing_ok=True)
            raise DamagedDownload(
                f"the hub sends more than the {counted(self._file.size_bytes, 'byte')} that {self._file.path!r} should "
                "have; it was deleted",
                hint="try again later, or take the model from the other hub with --source",
            )
        target.write(chunk)
        self._checksum.feed(chunk)
        self._done += len(chunk)
        self._on_bytes(len(chunk))


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes are safe from a power cut, before a name says that they are whole."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def _open_to_append(path: Path) -> BinaryIO:
    no_links = getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | no_links | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(descriptor, "wb")


def _without_first(count: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if count < len(chunk):
            yield chunk[count:]
        count = max(0, count - len(chunk))


def _raise_disk_error(partial: Path, error: OSError) -> NoReturn:
    if error.errno in _FULL:
        raise disk_full(partial.parent, f"the disk is full ({error.strerror})") from error
    raise OutputUnwritable(f"cannot write {str(partial)!r}: {error.strerror or error}") from error


def disk_full(folder: Path, what: str) -> AutofluxError:
    """The error for a cache without room."""
    return DiskFull(
        f"{what} at {str(folder)!r}; what has arrived is kept",
        hint="make room and run the command again, or set HF_HUB_CACHE or MODELSCOPE_CACHE to a folder on another disk",
    )
