"""Keeps a worker process running: starts it, starts it again when it died, and gives up after too many times."""

from __future__ import annotations

import threading
from typing import Protocol

from autoflux.errors import ErrorReport, describe
from autoflux.serving.messages import Broken, Ended, FromWorker, Load, Ready, ToWorker
from autoflux.serving.process import Deadlines, WorkerProcess

MAX_FAILURES = 5
"""Worker processes that may end in a row without having finished a job."""

LONGEST_PAUSE_SECONDS = 30.0


class Listener(Protocol):
    """Who hears what becomes of the worker. Called from the supervisor's thread."""

    def received(self, message: FromWorker) -> None:
        """The worker says something."""

    def lost(self, reason: ErrorReport, *, final: bool) -> None:
        """The worker is gone; unless `final`, another one will be started."""


class Worker(Protocol):
    """What draws for the service: a supervised process, or a fake."""

    def start(self, load: Load, listener: Listener) -> None:
        """Begin loading; everything after is told to the listener."""

    def send(self, message: ToWorker) -> None:
        """Pass a message on. Never blocks; a message to a worker that is gone is lost."""

    def switch(self, load: Load) -> None:
        """End it and begin anew with another plan. Never blocks; what it was drawing is lost and not told."""

    def stop(self) -> None:
        """End it; returns when it has ended. Does nothing when it was never started."""


class Supervisor(Worker):
    """Runs one worker process after the other until `stop`."""

    def __init__(self, deadlines: Deadlines | None = None, *, first_pause_seconds: float = 0.5) -> None:
        self._deadlines = deadlines or Deadlines()
        self._first_pause_seconds = first_pause_seconds
        self._process: WorkerProcess | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._was_ready = False
        self._failures = 0
        self._broken: ErrorReport | None = None
        self._load: Load | None = None
        self._switching = False

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while there is no worker."""
        process = self._process
        return process.pid if process else None

    def start(self, load: Load, listener: Listener) -> None:
        self._load = load
        self._thread = threading.Thread(target=self._supervise, args=(listener,), name="autoflux-supervisor")
        self._thread.daemon = True
        self._thread.start()

    def send(self, message: ToWorker) -> None:
        process = self._process
        if process:
            process.send(message)

    def switch(self, load: Load) -> None:
        with self._lock:
            self._load = load
            if self._process:
                self._switching = True
                self._process.stop()

    def stop(self) -> None:
        with self._lock:
            self._stopping.set()
            if self._process:
                self._process.stop()
        if self._thread:
            self._thread.join()

    def _supervise(self, listener: Listener) -> None:
        try:
            self._keep_running(listener)
        except Exception as error:  # noqa: BLE001 — a process that cannot be started, or a listener with a bug
            if self._process:
                self._process.stop()
            listener.lost(describe(error), final=True)

    def _keep_running(self, listener: Listener) -> None:
        while process := self._spawn():
            process.read(lambda message: self._pass_on(message, listener))
            with self._lock:
                self._process = None
                switching, self._switching = self._switching, False
            reason = process.post_mortem()
            if self._stopping.is_set():
                return
            if switching:
                continue
            self._failures += 1
            final = self._hopeless()
            listener.lost(self._broken or reason, final=final)
            if final or self._stopping.wait(self._pause_seconds()):
                return

    def _spawn(self) -> WorkerProcess | None:
        with self._lock:
            if self._stopping.is_set() or self._load is None:
                return None
            self._broken = None
            self._process = WorkerProcess(self._deadlines.allowing(self._load.plan))
            self._process.send(self._load)
            return self._process

    def _pass_on(self, message: FromWorker, listener: Listener) -> None:
        if isinstance(message, Ready):
            self._was_ready = True
        elif isinstance(message, Ended):
            self._failures = 0
        elif isinstance(message, Broken):
            self._broken = message.error
        listener.received(message)

    def _hopeless(self) -> bool:
        # What could not be built the first time will not be the second; later it may be for want of memory.
        return self._failures >= MAX_FAILURES or (self._broken is not None and not self._was_ready)

    def _pause_seconds(self) -> float:
        return float(min(self._first_pause_seconds * 2 ** (self._failures - 1), LONGEST_PAUSE_SECONDS))
