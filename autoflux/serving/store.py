"""A job store in memory. A durable one has the same methods."""

from __future__ import annotations

import builtins
import threading
from collections import OrderedDict

from autoflux.serving.jobs import Job, JobStore


class MemoryStore(JobStore):
    """Keeps all unfinished jobs, and of the finished ones at most `max_finished` and `max_picture_bytes`.

    The oldest finished jobs go first, with their pictures. Safe from any thread.
    """

    def __init__(self, *, max_finished: int = 500, max_picture_bytes: int = 512_000_000) -> None:
        self._max_finished = max_finished
        self._max_picture_bytes = max_picture_bytes
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._pictures: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()

    def put(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.id] = job
            self._drop_oldest(keep=job.id)

    def get(self, job_id: str) -> Job | None:
        with self._lock:
            return self._jobs.get(job_id)

    def list(self) -> builtins.list[Job]:
        with self._lock:
            return [*self._jobs.values()]

    def put_picture(self, job_id: str, index: int, png: bytes) -> None:
        with self._lock:
            self._pictures.setdefault(job_id, {})[index] = png
            self._drop_oldest(keep=job_id)

    def picture(self, job_id: str, index: int) -> bytes | None:
        with self._lock:
            return self._pictures.get(job_id, {}).get(index)

    def _drop_oldest(self, keep: str) -> None:
        finished = [job.id for job in self._jobs.values() if job.state.finished]
        while finished and (len(finished) > self._max_finished or self._picture_bytes() > self._max_picture_bytes):
            oldest = finished.pop(0)
            if oldest != keep:
                del self._jobs[oldest]
                self._pictures.pop(oldest, None)

    def _picture_bytes(self) -> int:
        return sum(len(png) for pictures in self._pictures.values() for png in pictures.values())
