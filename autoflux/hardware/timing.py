"""Timing of work that a device does in the background. Pure but for the clock; knows no torch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

ROUND_SECONDS = 0.02
"""A round lasts at least this long, so that the clock and one synchronization (some 10 µs) do not matter."""

ROUNDS = 5
BUDGET_SECONDS = 0.4
"""No new round is begun after this, so that a slow machine does not wait for minutes."""

SUSTAINED_SECONDS = 0.4
"""How long work goes on whose lasting rate is wanted. The first half does not count: one H200 multiplies bfloat16 at
800 TFLOP/s for some 30 ms and then, at its power limit, at 690. A picture takes seconds, so the lower figure is the
true one."""

LAUNCHES = 8
"""Calls whose launching is timed together. Drivers take some thousand operations before they let the host wait, and a
block is about a hundred."""

LARGEST_SECONDS = 0.25
"""A larger size is tried only if a call will take less than this."""

Call = Callable[[], object]


class Work(Protocol):
    """A size of work, and how many operations it takes: what its seconds are expected to grow with."""

    @property
    def operations(self) -> float: ...


W = TypeVar("W", bound=Work)


def round_seconds(
    call: Call,
    synchronize: Call,
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


def quick_seconds(call: Call, synchronize: Call) -> float:
    """Seconds of one call, after one that loads kernels and touches memory. An estimate: other programs may disturb."""
    _timed(call, synchronize, 1)
    return min(_timed(call, synchronize, 1) for _ in range(2))


def sustained_seconds(call: Call, synchronize: Call, *, seconds: float = SUSTAINED_SECONDS) -> float:
    """Median seconds a call, of rounds begun in the second half of `seconds`: clocks and power have settled by then.

    Takes at most `seconds` and five calls, or rounds of 0.02 s.
    """
    count = max(1, math.ceil(ROUND_SECONDS / quick_seconds(call, synchronize)))
    taken: list[float] = []
    begun = time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds or not taken:
        round_ = _timed(call, synchronize, count) / count
        if spent >= seconds / 2:
            taken.append(round_)
    return statistics.median(taken)


def launch_seconds(call: Call, synchronize: Call) -> float:
    """Median seconds of the host for a call that the device is quicker to do: until it returns, not until it is done.

    Where work is not done in the background it is the time of the call.
    """
    _timed(call, synchronize, 1)
    taken: list[float] = []
    for _ in range(ROUNDS):
        synchronize()
        begun = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        taken.append((time.perf_counter() - begun) / LAUNCHES)
    return statistics.median(taken)


def climb(
    sizes: Sequence[W],
    make: Callable[[W], Call],
    synchronize: Call,
    *,
    largest_seconds: float = LARGEST_SECONDS,
) -> tuple[W, float]:
    """The largest of `sizes`, tried from the smallest up, that runs and is quick enough; and its sustained seconds.

    `make` gives what is to be called at a size. A size that fails (mostly for want of memory) ends the climb at the one
    before; what the first one throws is thrown.
    """
    size, call = sizes[0], make(sizes[0])
    seconds = quick_seconds(call, synchronize)
    for larger in sizes[1:]:
        if seconds * larger.operations / size.operations > largest_seconds:
            break
        try:
            next_call = make(larger)
            seconds = quick_seconds(next_call, synchronize)
        except Exception:  # noqa: BLE001 — drivers and torch throw whatever they like
            break
        size, call = larger, next_call
    return size, sustained_seconds(call, synchronize)


def keep_busy(call: Call, synchronize: Call, seconds: float) -> None:
    """Repeat `call` so that clocks and links leave their power-saving states."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        synchronize()


def _timed(call: Call, synchronize: Call, count: int) -> float:
    synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return max(time.perf_counter() - begun, 1e-9)
