"""Waking coroutines from other threads when a job has changed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


class Watchers:
    """Who waits for which job. `wake` may be called from any thread, also when a loop has been closed meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    @contextlib.contextmanager
    def waiting_for(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event of the running loop that is set at every change of the job."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiting.setdefault(job_id, []).append(entry)
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._waiting[job_id].remove(entry)
                if not self._waiting[job_id]:
                    del self._waiting[job_id]

    def wake(self, job_id: str) -> None:
        """Wake those that wait for this job."""
        with self._lock:
            entries = list(self._waiting.get(job_id, ()))
        for loop, event in entries:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)

    def wake_all(self) -> None:
        """Wake everybody: the queue has moved, or the service has ended."""
        with self._lock:
            job_ids = list(self._waiting)
        for job_id in job_ids:
            self.wake(job_id)
