"""Measuring what drawing takes: seconds on the device's clock, and memory at its most. Does not import torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from autoflux.hardware import load
from autoflux.hardware.host import read as read_host
from autoflux.planning.fitting import Measured
from autoflux.planning.values import PhaseBytes, Plan
from autoflux.runtime.memory import peak_ram_bytes
from autoflux.runtime.session import Drawing

_Moment = Any
"""Seconds on the host's clock, or an event of torch's on the device's."""

COUNTED = ("cuda", "xpu")
"""Kinds of devices whose memory torch counts."""


class Meter:
    """Times the parts of drawing one batch. Switched off it costs nothing, and has measured nothing.

    It waits for the device around encoding and decoding, so that what it was told to do is done. Between steps it
    waits only where the device has no clock of its own: one that is told of the next step late takes longer for it than
    in other pictures.
    """

    def __init__(self, plan: Plan, *, on: bool) -> None:
        self._on = on
        self._gauge = _Gauge(plan) if on else None
        self._unsettled = 2 if plan.graphs else 1
        self._begun = load.moment() if on else None
        self._moments: list[_Moment] = []
        self._seconds = {"encode": 0.0, "decode": 0.0}
        self._peaks: dict[str, int | None] = dict.fromkeys(("encode", "denoise", "decode"))

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Around what is done before the first step."""
        with self._part("encode"):
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step of all pictures of the batch."""
        if self._gauge is None:
            yield
            return
        self._gauge.forget()
        self._moments = self._moments or [self._gauge.moment()]
        yield
        self._moments.append(self._gauge.moment())
        self._note("denoise", self._gauge.peak())

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around what is done after the last step."""
        with self._part("decode"):
            yield

    def measured(self, drawings: Sequence[Drawing], *, encoded: bool) -> Measured | None:
        """What drawing these took; None if it is switched off or there was no step."""
        if self._gauge is None or not self._moments:
            return None
        steps = tuple(_between(*moments) for moments in pairwise(self._moments))
        width, height = drawings[0].request.size
        return Measured(
            width=width,
            height=height,
            batch=len(drawings),
            begin_seconds=self._seconds["encode"],
            step_seconds=steps,
            finish_seconds=self._seconds["decode"],
            encoded=encoded,
            peak_vram_bytes=self._phases(),
            peak_ram_bytes=peak_ram_bytes(),
            unsettled=self._unsettled,
            processor_share=self._processor_share(),
        )

    def _processor_share(self) -> float | None:
        ended = load.moment()
        if self._begun is None or ended is None or ended.wall - self._begun.wall < load.LOOK_SECONDS:
            return None  # too short for the system's clocks
        return load.share_left(self._begun, ended, read_host().cores)

    def _phases(self) -> PhaseBytes | None:
        peaks = {phase: peak for phase, peak in self._peaks.items() if peak is not None}
        return PhaseBytes(**peaks) if len(peaks) == len(self._peaks) else None

    @contextmanager
    def _part(self, phase: str) -> Iterator[None]:
        if self._gauge is None:
            yield
            return
        self._gauge.forget()
        began = self._gauge.settled()
        yield
        self._seconds[phase] += self._gauge.settled() - began
        self._note(phase, self._gauge.peak())

    def _note(self, phase: str, peak: int | None) -> None:
        if peak is not None:
            self._peaks[phase] = max(peak, self._peaks[phase] or 0)


def _between(first: _Moment, second: _Moment) -> float:
    """Seconds, once the device has passed both."""
    return float(second - first if isinstance(first, float) else first.elapsed_time(second) / 1000)


class _Gauge:
    """Clock and memory of a plan's device."""

    def __init__(self, plan: Plan) -> None:
        self._device = plan.device
        self._context_bytes = plan.priors.context_bytes
        self._most = 0
        # Looked up, not imported: a pipeline without torch uses no device of torch's.
        self._torch: Any = None if plan.device == "cpu" else sys.modules.get("torch")
        self._forget_loading()

    def _forget_loading(self) -> None:
        """Give back what loading left over, which is no part of drawing."""
        if self._counts:
            self._torch.accelerator.empty_cache()

    @property
    def _counts(self) -> bool:
        return self._torch is not None and self._device.partition(":")[0] in COUNTED

    def settled(self) -> float:
        """The time on the host's clock, once the device has nothing left to do."""
        if self._torch is not None:
            self._torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def moment(self) -> _Moment:
        """When the device has done what it was told so far; waits for it where it has no clock."""
        if not self._counts:
            return self.settled()
        device = self._torch.device(self._device)
        event = self._torch.Event(device, enable_timing=True)
        event.record(self._torch.accelerator.current_stream(device))
        return event

    def forget(self) -> None:
        """Begin anew with the peak of memory."""
        if self._counts:
            self._torch.accelerator.reset_peak_memory_stats(self._device)

    def peak(self) -> int | None:
        """The most that was on the device since then: tensors, what torch holds beyond them, and the context, which is
        as large as the plan counts it."""
        if not self._counts:
            return None
        allocated = int(self._torch.accelerator.max_memory_allocated(self._device))
        self._most = max(self._most, allocated)
        unused = max(0, int(self._torch.accelerator.max_memory_reserved(self._device)) - self._most)
        return allocated + unused + self._context_bytes
