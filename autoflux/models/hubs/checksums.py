"""Whether a file holds what its hub says it should."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from autoflux.models.hubs.values import RemoteFile
from autoflux.units import counted

CHUNK_BYTES = 1 << 20

OnBytes = Callable[[int], None]


class Checksum:
    """The checksum of a file, fed piece by piece: SHA-256, or git's SHA-1 of the content as a blob."""

    def __init__(self, file: RemoteFile) -> None:
        self.expected = file.sha256 or file.git_sha1
        self.kind = "sha256" if file.sha256 else "git sha1"
        # git's own identity of a file, no protection against forgery; hubs give no other for files outside of LFS.
        self._digest = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
        if not file.sha256:
            self._digest.update(b"blob %d\0" % file.size_bytes)

    def feed(self, data: bytes) -> None:
        self._digest.update(data)

    def feed_file(self, path: Path, on_bytes: OnBytes = lambda _count: None) -> int:
        """Feed a whole file; returns its length in bytes."""
        length = 0
        with path.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                self.feed(chunk)
                length += len(chunk)
                on_bytes(len(chunk))
        return length

    @property
    def value(self) -> str:
        return self._digest.hexdigest()

    @property
    def matches(self) -> bool:
        """Whether what was fed is what the hub promised. A file without a promise matches."""
        return self.expected is None or self.value == self.expected


def fault(path: Path, file: RemoteFile, on_bytes: OnBytes = lambda _count: None) -> str | None:
    """Read a file and say what is wrong with it, if anything."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != file.size_bytes:
        return f"has {counted(size, 'byte')}, not {file.size_bytes:,}"
    checksum = Checksum(file)
    try:
        checksum.feed_file(path, on_bytes)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if checksum.matches:
        return None
    return f"has the {checksum.kind} {checksum.value}, not {checksum.expected}"
