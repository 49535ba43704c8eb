"""How much of the processors and cards other programs leave: what is measured while they compute is too low."""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil

LEAST_SHARE = 0.85
"""Of the processors that this process may use. A desktop with its programs open and idle takes a few per cent; two
programs that compute on two cores leave 50 %."""

MOST_DISTURBED = 3
"""After so many disturbed measurements in a row the next one counts: this machine is always like that."""

MOST_BUSY = 0.25
"""Of the time a card may compute for others. A desktop that is drawn takes up to a tenth; a model takes nearly all."""

LOOK_SECONDS = 0.2
"""Twenty ticks of Linux's clock on each processor."""


class Moment(NamedTuple):
    """Seconds on three clocks: the wall's, of all processors at rest, and of this process computing."""

    wall: float
    idle: float
    own: float
    all: float
    """Of all processors, whatever they did; does not move where the system does not tell."""


def moment() -> Moment | None:
    """Now; None where the system does not tell what its processors do."""
    try:
        times = psutil.cpu_times()
    except Exception:  # noqa: BLE001 — psutil reads files that sandboxes hide in many ways
        return None
    idle = times.idle + getattr(times, "iowait", 0.0)
    return Moment(time.perf_counter(), idle, time.process_time(), sum(times))


def share_left(begun: Moment | None, ended: Moment | None, cores: int) -> float | None:
    """The share of `cores` that this process had, or could have had, between two moments; None if it is not known.

    In a container the system counts all processors of the host: what is at rest elsewhere could have been had here.
    """
    if begun is None or ended is None or ended.wall <= begun.wall or ended.all <= begun.all:
        return None
    had = ended.own - begun.own + ended.idle - begun.idle
    return min(1.0, max(0.0, had / (ended.wall - begun.wall) / cores))


def is_disturbed(share: float | None) -> bool:
    """Whether other programs took too much, by what `share_left` says; not where that cannot be known."""
    return share is not None and share < LEAST_SHARE


def is_quiet(cores: int) -> bool:
    """Whether other programs leave the processors alone now; also where that cannot be known. Takes 0.2 s."""
    begun = moment()
    time.sleep(LOOK_SECONDS)
    return not is_disturbed(share_left(begun, moment(), cores))
