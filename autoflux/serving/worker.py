"""The worker process: builds the pipeline, then draws what it is sent, one step at a time.

It ends at once when it is told to stop and when the service is gone, whatever it is doing: a reader thread sees to
that. It holds nothing but memory, so there is nothing to tidy up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Protocol

from autoflux import process
from autoflux.errors import AutofluxError, DamagedPack, ErrorReport, PluginFailure, describe
from autoflux.runtime import allocator, bytecode
from autoflux.runtime.memory import peak_ram_bytes, peak_vram_bytes
from autoflux.runtime.meter import Meter
from autoflux.runtime.picture import png_files
from autoflux.serving.channel import Channel, worker_end
from autoflux.serving.messages import (
    Alive,
    Broken,
    Cancel,
    Coming,
    Ended,
    Finished,
    FromWorker,
    Load,
    Loading,
    Ready,
    Run,
    Started,
    Stepped,
    Stop,
    Took,
    ToWorker,
)
from autoflux.serving.packer import Packer

if TYPE_CHECKING:
    from autoflux.runtime.picture import Picture
    from autoflux.runtime.session import Session

ALIVE_SECONDS = 1.0


class Outbox(Protocol):
    """Where a drawing reports to."""

    def send(self, message: FromWorker) -> None: ...


class Cancelled(Exception):
    """The job that is being drawn is not wanted any more."""


class Inbox:
    """What the service has sent, read by a thread so that Stop and Cancel are seen at any time."""

    def __init__(self, channel: Channel[FromWorker, ToWorker]) -> None:
        self._channel = channel
        self._messages: queue.SimpleQueue[Load | Run] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._coming: tuple[str, ...] = ()
        threading.Thread(target=self._read, name="autoflux-inbox", daemon=True).start()

    def load(self) -> Load:
        """The first message."""
        message = self._messages.get()
        if not isinstance(message, Load):
            raise PluginFailure(f"the first message must be Load, got {type(message).__name__}")
        self._coming = self._coming or message.coming
        return message

    @property
    def coming(self) -> tuple[str, ...]:
        """Prompts that wait to be drawn, as far as it is known yet."""
        return self._coming

    def next_run(self, timeout: float) -> Run | None:
        """The next job, None when none came in `timeout` seconds."""
        with contextlib.suppress(queue.Empty):
            message = self._messages.get(timeout=timeout)
            return message if isinstance(message, Run) else None
        return None

    def cancelled(self, job_id: str) -> bool:
        return job_id in self._cancelled

    def forget(self, job_id: str) -> None:
        """The job is over; a cancel that comes later means nothing."""
        self._cancelled.discard(job_id)

    def _read(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(message, Stop):
                os._exit(0)
            elif isinstance(message, Cancel):
                self._cancelled.add(message.job_id)
            elif isinstance(message, Coming):
                self._coming = message.prompts
            elif message is not None:
                self._messages.put(message)


def main(connection: Connection, log: str | None) -> None:
    """Run until told to stop. `log` gets what libraries print; None leaves it on the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.claim()
    bytecode.keep()
    if log:
        _print_into(log)
    faulthandler.enable()
    allocator.apply(os.environ)  # has been done where the program was started, but not where a service was
    channel = worker_end(connection)
    inbox = Inbox(channel)
    try:
        load = inbox.load()
        session = _load(load, channel, inbox)
    except Exception as error:
        channel.send(Broken(error=describe(error)))
        raise SystemExit(1) from error
    channel.send(Ready(device=load.plan.device))
    packer: Packer | None = None
    while True:
        run = inbox.next_run(ALIVE_SECONDS)
        if run is None:
            _use_the_time(session, packer)
            channel.send(Alive())
            continue
        if packer:
            packer.pause()
        _run(session, run, channel, inbox)
        inbox.forget(run.job_id)
        packer = packer or Packer(load.plan, load.model)  # after the first picture, not before


def _print_into(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def _use_the_time(session: Session, packer: Packer | None) -> None:
    """What is better done while nobody waits: read what the first jobs did without, then write packs."""
    if session.deferred:
        session.warm_up()
    elif packer:
        packer.resume()


def _load(load: Load, outbox: Outbox, inbox: Inbox) -> Session:
    """Text encoders first, unless the prompts that wait were encoded before. If any wait, the first is the warm-up."""

    def progress(stage: str, share: float) -> None:
        outbox.send(Loading(stage=stage, progress=share))

    progress("starting", 0.0)
    from autoflux.plugin_manager import load_plugins  # noqa: PLC0415 — may import torch, so only here
    from autoflux.runtime.opening import open_with  # noqa: PLC0415

    backend = load_plugins().backends.get(load.plan.backend)
    session = open_with(backend, load.plan, load.model, progress, inbox.coming)
    if load.warm_up and not inbox.coming:
        progress("drawing a first step", 1.0)
        session.warm_up()
    return session


def _run(session: Session, run: Run, outbox: Outbox, inbox: Inbox) -> None:
    """Draw a job and say how it ended."""

    def ended(*, cancelled: bool = False, error: ErrorReport | None = None) -> Ended:
        return Ended(
            job_id=run.job_id,
            attempt=run.attempt,
            cancelled=cancelled,
            error=error,
            peak_vram_bytes=peak_vram_bytes(session.plan.device),
            peak_ram_bytes=peak_ram_bytes() or 0,
        )

    try:
        _draw(session, run, outbox, inbox)
    except Cancelled:
        outbox.send(ended(cancelled=True))
    except DamagedPack as error:
        # A fresh process reads the model's own files: it was dropped, or is passed over.
        outbox.send(ended(error=error.report()))
        raise
    except AutofluxError as error:
        outbox.send(ended(error=error.report()))
    except Exception as error:
        # Nobody knows what state the device is in now. The job has failed; a fresh process takes the next one.
        outbox.send(ended(error=describe(error)))
        raise
    else:
        outbox.send(ended())


def _draw(session: Session, run: Run, outbox: Outbox, inbox: Inbox) -> None:
    """Draw the pictures of a job in batches, looking for a cancel between steps."""
    outbox.send(Started(job_id=run.job_id, attempt=run.attempt))
    session.measured = run.measured
    step = sum(run.requests[index].steps for index in run.drawn)
    missing = [index for index in range(len(run.requests)) if index not in run.drawn]
    for group in session.groups([run.requests[index] for index in missing]):
        indexes = [missing[position] for position in group]
        meter = Meter(session.plan, on=run.measured)
        with meter.encoding():
            drawings = [session.begin(run.requests[index], afresh=run.afresh) for index in indexes]
        while unfinished := [drawing for drawing in drawings if not drawing.finished]:
            if inbox.cancelled(run.job_id):
                raise Cancelled
            with meter.step():
                session.advance(unfinished)
            step += len(unfinished)
            outbox.send(Stepped(job_id=run.job_id, attempt=run.attempt, step=step))
        with meter.decoding():
            pictures = session.finish(drawings)
        if measured := meter.measured(drawings, encoded=run.afresh):
            outbox.send(Took(job_id=run.job_id, attempt=run.attempt, measured=measured))
        for index, picture, png in zip(indexes, pictures, png_files(pictures), strict=True):
            outbox.send(_finished(run, index, picture, png))


def _finished(run: Run, index: int, picture: Picture, png: bytes) -> Finished:
    return Finished(
        job_id=run.job_id,
        attempt=run.attempt,
        index=index,
        png=png,
        seconds=picture.seconds,
        warnings=picture.warnings,
    )
