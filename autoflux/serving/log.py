"""What a worker process prints: kept away from the terminal, and quoted when the process dies."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

MAX_CHARACTERS = 300


class WorkerLog:
    """A temporary file that the worker's output goes to; with AUTOFLUX_DEBUG it stays on the terminal."""

    def __init__(self) -> None:
        self.path: str | None = None
        self._descriptor: int | None = None
        if not os.environ.get("AUTOFLUX_DEBUG"):
            self._descriptor, self.path = tempfile.mkstemp(prefix="autoflux-worker-", suffix=".log")

    def forget_name(self) -> None:
        """The worker has opened it: from now on it needs no name, and goes with the processes, however they end.

        Windows does not allow that; there it is deleted by `take`.
        """
        if self.path is not None:
            with contextlib.suppress(OSError):
                Path(self.path).unlink()
                self.path = None

    def take(self) -> str:
        """The last line that was printed. Call once, at the end."""
        if self._descriptor is None:
            return ""
        with os.fdopen(self._descriptor, "rb") as file:
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        self.forget_name()
        return lines[-1][:MAX_CHARACTERS] if lines else ""
