"""What a process takes of the card and of RAM, and a cap on the former."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple, Self

import psutil
import torch


def resident_bytes() -> int:
    """The RAM that this process has."""
    return int(psutil.Process().memory_info().rss)


class HighWater:
    """The most RAM that this process had while the context lasted, looked at 20 times a second."""

    PAUSE_SECONDS = 0.05

    def __init__(self, resident_bytes: Callable[[], int]) -> None:
        """`resident_bytes` tells how much it has now: see `resident_bytes`."""
        self._resident_bytes = resident_bytes
        self._ended = threading.Event()
        self.nbytes = 0

    def __enter__(self) -> Self:
        self._watch = threading.Thread(target=self._follow, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()

    def _follow(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, self._resident_bytes())
            if self._ended.wait(self.PAUSE_SECONDS):
                return


class IdleRam:
    """RAM of the process between plans, of which a new process would not have what other plans have left."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._last = self._compiler = 0

    def note(self, nbytes: int, *, compiled: bool) -> None:
        """So much it is now that a plan was unloaded."""
        if self._first is None:
            self._first = self._last = nbytes
        if compiled and not self._compiler:
            self._compiler = max(0, nbytes - self._last)
        self._last = nbytes

    def grow(self, nbytes: int) -> None:
        """More weights lie there for all plans."""
        if self._first is not None:
            self._first += nbytes
            self._last += nbytes

    def left_bytes(self, *, compiled: bool) -> int:
        """What others than such a plan have left, code above all; what compiles is there for every plan that does."""
        own = self._compiler if compiled else 0
        return max(0, self._last - (self._first or 0) - own)


class Peaks(NamedTuple):
    """The most bytes of a card for a while."""

    allocated: int
    """That tensors took."""
    reserved: int
    """That torch took, the context not included."""


class Card:
    """What this process takes of the card; zeros without one."""

    def __init__(self, *, there: bool) -> None:
        self.there = there
        self._reserved = 0
        self.context_bytes = 0

    def synchronize(self) -> None:
        if self.there:
            torch.cuda.synchronize()

    def cap(self, nbytes: int, context_bytes: int) -> None:
        """Forbid torch to hold more than that less the context: as planned, or as it was if that was less."""
        if self.there:
            self._look()
            taken = min(context_bytes, self.context_bytes)
            share = (nbytes - taken) / torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def uncap(self) -> None:
        """Let torch hold what it likes."""
        if self.there:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def restart(self) -> None:
        """Forget the peak so far."""
        self._reserved = 0
        if self.there:
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> Peaks:
        """Since this was last asked; `peak_bytes` remembers."""
        if not self.there:
            return Peaks(0, 0)
        self._look()
        taken = Peaks(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return taken

    def peak_bytes(self) -> int:
        """The most that the process took, the driver's part included."""
        self._look()
        return self._reserved + self.context_bytes

    def held_bytes(self) -> tuple[int, int]:
        """What torch has reserved now, and what of that tensors take."""
        return (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) if self.there else (0, 0)

    def given_back(self) -> int:
        """How often torch had to give back all pieces it held before it was given more: each time it waits."""
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if self.there else 0

    def release(self) -> None:
        """Give back what nothing uses."""
        gc.collect()
        _give_back_freed_ram()
        if self.there:
            torch.cuda.empty_cache()

    def _look(self) -> None:
        if not self.there:
            return
        torch.cuda.synchronize()
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved())
        free, total = torch.cuda.mem_get_info()
        self.context_bytes = total - free - torch.cuda.memory_reserved()


def _give_back_freed_ram() -> None:
    """Let the system have RAM that was freed and that the C library keeps, where that is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
