"""Timing a start: a service and its worker process from nothing to the first picture."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from autoflux.errors import AutofluxError, ErrorReport
from autoflux.models.request import Order
from autoflux.serving.messages import Ended, Finished, FromWorker, Loading, Ready, Started, Stepped
from autoflux.serving.preparation import Prepared, revive
from autoflux.serving.service import Service
from autoflux.values import Value

ENCODERS = "loading text encoder"
"""What stages of loading begin with while text encoders are read."""


class Stage(Value, frozen=True, kw_only=True):
    """A moment of a start, in seconds since a worker process was asked for."""

    name: str
    seconds: float


class StartTimes(Value, frozen=True, kw_only=True):
    """Seconds since a worker process was asked for, and what it took at most."""

    encoder_seconds: float
    """How long text encoders were read for; 0 if they were not."""
    accepted_seconds: float
    """Until an order was accepted."""
    ready_seconds: float
    first_picture_seconds: float
    peak_vram_bytes: int
    """What torch took of the device, without the driver's context; 0 on the CPU."""
    peak_ram_bytes: int
    """Of the worker process."""
    stages: tuple[Stage, ...]
    """When the process ran, each component was begun to be loaded, each step of the picture was done, it was there."""


class TimedService(Service):
    """A service that writes down when its worker said what."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.model, warm_up=False)
        self._of = prepared
        self._began = 0.0
        self._said: list[tuple[float, FromWorker]] = []
        self._failed: AutofluxError | None = None
        self._is_ready, self._over = threading.Event(), threading.Event()

    def time_start(self, order: Order, *, when_ready: bool) -> StartTimes:
        """Start, draw the order, and stop; with `when_ready`, orders are accepted only once everything is loaded.

        Raises:
            AutofluxError: what loading or drawing failed with.
        """
        self._began = time.monotonic()
        accepted = 0.0
        try:
            if not when_ready:
                accepted = self._ordered(order)
            self.start(lambda _on_stage: self._of, self._fail_with)
            if when_ready:
                self._is_ready.wait()
                accepted = self._ordered(order)
            self._over.wait()
            return self._times(accepted)
        finally:
            self.stop()

    def received(self, message: FromWorker) -> None:
        self._said.append((time.monotonic() - self._began, message))
        super().received(message)
        if isinstance(message, Ready):
            self._is_ready.set()
        elif isinstance(message, Ended):
            self._over.set()

    def lost(self, reason: ErrorReport, *, final: bool) -> None:
        super().lost(reason, final=final)
        self._fail_with(revive(reason))  # a start that takes two processes is none to be timed

    def _fail_with(self, error: AutofluxError) -> None:
        self._failed = self._failed or error
        self._is_ready.set()
        self._over.set()

    def _ordered(self, order: Order) -> float:
        if self._failed:
            raise self._failed
        self.submit(order)
        return time.monotonic() - self._began

    def _times(self, accepted: float) -> StartTimes:
        if self._failed:
            raise self._failed
        first = {kind: next((t, m) for t, m in self._said if isinstance(m, kind)) for kind in (Ready, Ended)}
        ended = first[Ended][1]
        assert isinstance(ended, Ended)  # noqa: S101
        if ended.error:
            raise revive(ended.error)
        return StartTimes(
            encoder_seconds=self._encoder_seconds(),
            accepted_seconds=accepted,
            ready_seconds=first[Ready][0],
            first_picture_seconds=next(t for t, m in self._said if isinstance(m, Finished)),
            peak_vram_bytes=ended.peak_vram_bytes,
            peak_ram_bytes=ended.peak_ram_bytes,
            stages=tuple(self._stages()),
        )

    def _stages(self) -> Iterator[Stage]:
        """Of one that is told more than once, its beginning."""
        told: set[str] = set()
        for seconds, message in self._said:
            name = _stage(message)
            if name and name not in told:
                told.add(name)
                yield Stage(name=name, seconds=seconds)

    def _encoder_seconds(self) -> float:
        """From the first stage that reads one to the first that does not."""
        stages = [(t, m.stage.startswith(ENCODERS)) for t, m in self._said if isinstance(m, Loading)]
        begin = next((t for t, encoding in stages if encoding), None)
        if begin is None:
            return 0.0
        ready = next(t for t, m in self._said if isinstance(m, Ready))
        return next((t for t, encoding in stages if t > begin and not encoding), ready) - begin


def _stage(message: FromWorker) -> str | None:
    match message:
        case Loading():
            return message.stage
        case Ready():
            return "ready"
        case Started():
            return "drawing"
        case Stepped():
            return f"step {message.step} done"
        case Finished():
            return "picture"
        case _:
            return None
