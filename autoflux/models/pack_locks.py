"""Who makes, uses or removes packs, told by locks that the system releases when a process ends in any way."""

from __future__ import annotations

import uuid
from pathlib import Path

from filelock import FileLock, Timeout


class PackLocks:
    """Those in one folder: `KEY.lock`, the gate, is held for making and removing, `KEY.N.use` by each user."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def gate(self, key: str, timeout_seconds: float) -> FileLock:
        """To be held while a pack comes or goes; waits without end if the timeout is negative."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._folder / f"{key}.lock", timeout=timeout_seconds)

    def room(self) -> FileLock:
        """To be held while room is made."""
        return FileLock(self._folder / "room.lock")

    def use(self, key: str) -> FileLock:
        """One more use, held; behind the gate, so that nobody takes it for that of a process that has ended."""
        use = FileLock(self._folder / f"{key}.{uuid.uuid4().hex}.use", thread_local=False)
        use.acquire(timeout=0)
        return use

    def is_idle(self, key: str) -> bool:
        """Whether nobody makes, removes or uses it."""
        try:
            with self.gate(key, 0):
                return not self.in_use(key)
        except Timeout:
            return False

    def in_use(self, key: str) -> bool:
        """Whether somebody uses it; behind the gate."""
        for file in self._folder.glob(f"{key}.*.use"):
            try:
                with FileLock(file, timeout=0):
                    pass
            except Timeout:
                return True
            # Its process has ended without a word.
            file.unlink(missing_ok=True)
        return False


def let_go(use: FileLock) -> None:
    """End a use."""
    use.release(force=True)
    Path(use.lock_file).unlink(missing_ok=True)
