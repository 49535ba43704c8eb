"""Measuring what drawing takes: seconds on the device's clock, and memory at its most. Does not import torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from autoflux.hardware import load
from autoflux.hardware.host import read as read_host
from autoflux.planning.fitting import Measured
from autoflux.planning.values import PhaseBytes, Plan
from autoflux.runtime.memory import peak_ram_bytes
from autoflux.runtime.session import Drawing

COUNTED = ("cuda", "xpu")
"""Kinds of devices whose memory torch counts."""


class Meter:
    """Times the parts of drawing one batch. Switched off it costs nothing, and has measured nothing.

    Measuring waits for the device at the end of each part, so that what it was told to do is done.
    """

    def __init__(self, plan: Plan, *, on: bool) -> None:
        self._on = on
        self._gauge = _Gauge(plan) if on else None
        self._unsettled = 2 if plan.graphs else 1
        self._begun = load.moment() if on else None
        self._steps: list[float] = []
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
        with self._part("denoise"):
            yield

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around what is done after the last step."""
        with self._part("decode"):
            yield

    def measured(self, drawings: Sequence[Drawing], *, encoded: bool) -> Measured | None:
        """What drawing these took; None if it is switched off or there was no step."""
        if self._gauge is None or not self._steps:
            return None
        width, height = drawings[0].request.size
        return Measured(
            width=width,
            height=height,
            batch=len(drawings),
            begin_seconds=self._seconds["encode"],
            step_seconds=tuple(self._steps),
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
        began = self._gauge.start()
        yield
        seconds, peak = self._gauge.stop(began)
        if phase == "denoise":
            self._steps.append(seconds)
        else:
            self._seconds[phase] += seconds
        if peak is not None:
            self._peaks[phase] = max(peak, self._peaks[phase] or 0)


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

    def start(self) -> float:
        """The time, once the device has nothing left to do; the peak of memory is forgotten."""
        self._wait()
        if self._counts:
            self._torch.accelerator.reset_peak_memory_stats(self._device)
        return time.perf_counter()

    def stop(self, began: float) -> tuple[float, int | None]:
        """Seconds since then, and the most that was on the device: tensors, what torch holds beyond them, and the
        context, which is as large as the plan counts it."""
        self._wait()
        seconds = time.perf_counter() - began
        if not self._counts:
            return seconds, None
        allocated = int(self._torch.accelerator.max_memory_allocated(self._device))
        self._most = max(self._most, allocated)
        unused = max(0, int(self._torch.accelerator.max_memory_reserved(self._device)) - self._most)
        return seconds, allocated + unused + self._context_bytes

    def _wait(self) -> None:
        if self._torch is not None:
            self._torch.accelerator.synchronize(self._device)
