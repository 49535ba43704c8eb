"""One worker process: started, talked to, watched, and ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import msgspec

from autoflux.errors import ErrorReport
from autoflux.planning.values import Plan
from autoflux.serving import worker
from autoflux.serving.channel import service_end
from autoflux.serving.log import WorkerLog
from autoflux.serving.messages import Ended, FromWorker, Ready, Started, Stop, ToWorker
from autoflux.values import Value

POLL_SECONDS = 0.2


class Deadlines(Value, frozen=True, kw_only=True):
    """How long a worker may be silent before it counts as hanging. Generous: killing a slow one loses its work."""

    loading_seconds: float = 1800.0
    """Between two stages of loading; 24 GB from a slow disk take over ten minutes."""
    step_seconds: float = 600.0
    """Between two steps of a picture, and for encoding and decoding."""
    idle_seconds: float = 120.0
    """Between two signs of life while there is nothing to do."""
    stop_seconds: float = 3.0
    """Between asking the process to end and ending it."""

    def allowing(self, plan: Plan) -> Deadlines:
        """Longer ones for a machine that is known to be slow: a step may take as long as ten average pictures."""
        slow = 10 * plan.predicted.seconds_per_image
        return self.replace(step_seconds=max(self.step_seconds, slow), loading_seconds=max(self.loading_seconds, slow))


class WorkerProcess:
    """A spawned worker. `read` runs in one thread and alone ends the process; the rest may be called from any."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._silence_allowed = deadlines.loading_seconds
        self._hanging = False
        self._stop_before: float | None = None
        self._log = WorkerLog()
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._channel = service_end(ours)
        self._process = context.Process(
            target=worker.main, args=(theirs, self._log.path), name="autoflux-worker", daemon=True
        )
        with _interrupts_blocked():
            self._process.start()
        theirs.close()  # only the worker holds its end now, so that its death reads as end of file
        threading.Thread(target=self._send_all, name="autoflux-outbox", daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Never blocks, and says nothing when the worker is gone: `read` returns then."""
        self._outbox.put(message)

    def stop(self) -> None:
        """Ask the process to end; `read` returns when it has, or has been made to."""
        self._stop_before = time.monotonic() + self._deadlines.stop_seconds
        self.send(Stop())

    def read(self, received: Callable[[FromWorker], None]) -> None:
        """Hand every message to `received`; return when the process has ended or has been ended for hanging."""
        last = time.monotonic()
        while not self._overdue(last):
            try:
                message = self._channel.receive(POLL_SECONDS)
            except (EOFError, OSError, msgspec.MsgspecError):
                break
            if message is not None:
                self._log.forget_name()
                last = time.monotonic()
                self._adapt(message)
                received(message)
        self._end()

    def post_mortem(self) -> ErrorReport:
        """Why the process has ended, with the last thing it printed. Call once: it deletes the log."""
        last_words = self._log.take()
        hint = f"its last words: {last_words}" if last_words else None
        if self._hanging:
            message = f"the worker process made no progress for {self._silence_allowed:g} s and was ended"
            return ErrorReport(code="worker_hung", message=message, hint=hint)
        return ErrorReport(code="worker_died", message=f"the worker process {_how_ended(self._process)}", hint=hint)

    def _overdue(self, last: float) -> bool:
        now = time.monotonic()
        if self._stop_before is not None:
            return now > self._stop_before
        self._hanging = now - last > self._silence_allowed
        return self._hanging

    def _adapt(self, message: FromWorker) -> None:
        if isinstance(message, Started):
            self._silence_allowed = self._deadlines.step_seconds
        elif isinstance(message, Ready | Ended):
            self._silence_allowed = self._deadlines.idle_seconds

    def _end(self) -> None:
        self._outbox.put(None)
        if not self._hanging and self._stop_before is None:
            self._process.join(1.0)  # it closed the connection itself: let it leave its own exit code
        for kill in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                kill()
                self._process.join(self._deadlines.stop_seconds)
        self._channel.close()

    def _send_all(self) -> None:
        # A thread of its own: a stopped worker lets the pipe fill up, and that must not block the service.
        while (message := self._outbox.get()) is not None:
            try:
                self._channel.send(message)
            except OSError:
                return


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start the child with SIGINT blocked: Ctrl-C reaches the whole process group, but ending it is our job.

    Blocking before the start leaves no moment in which the child would answer with a traceback. The resource tracker
    of multiprocessing is started first, because starting it unblocks SIGINT.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()
    with _interrupts_deferred():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C that another thread is given ends a start in the main thread no sooner than the child has all it needs."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came = threading.Event()
    signal.signal(signal.SIGINT, lambda _number, _frame: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came.is_set():
            signal.raise_signal(signal.SIGINT)


def _how_ended(process: multiprocessing.process.BaseProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if name == "SIGKILL" and sys.platform == "linux":
        return "was killed (SIGKILL); on Linux this is what happens when the computer runs out of memory"
    return f"was killed by {name}"
