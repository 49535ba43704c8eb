"""Timing of work that a device does in the background. Pure but for the clock; knows no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

ROUND_SECONDS = 0.02
"""A round lasts at least this long, so that the clock and one synchronization (some 10 µs) do not matter."""

ROUNDS = 5
BUDGET_SECONDS = 0.4
"""No new round is begun after this, so that a slow machine does not wait for minutes."""


def round_seconds(
    call: Callable[[], object],
    synchronize: Callable[[], None],
    *,
    rounds: int = ROUNDS,
    budget_seconds: float = BUDGET_SECONDS,
) -> list[float]:
    """Seconds a call in each of several rounds of many calls queued back to back, after a warm-up."""
    once = _timed(call, synchronize, 1)  # slow the first time: kernels are loaded, memory is touched
    once = min(once, _timed(call, synchronize, 1)) if once < budget_seconds else once
    count = max(1, math.ceil(ROUND_SECONDS / max(once, 1e-6)))
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < rounds and (not taken or time.perf_counter() - begun < budget_seconds):
        taken.append(_timed(call, synchronize, count) / count)
    return taken


def keep_busy(call: Callable[[], object], synchronize: Callable[[], None], seconds: float) -> None:
    """Repeat `call` so that clocks and links leave their power-saving states."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        synchronize()


def _timed(call: Callable[[], object], synchronize: Callable[[], None], count: int) -> float:
    synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return max(time.perf_counter() - begun, 1e-9)
