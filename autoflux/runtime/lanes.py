"""Copying to a device beside its computation, on any kind of device; without streams, one after the other."""

from __future__ import annotations

import time
from typing import Protocol, cast

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the work of a device that other work can wait for."""

    def synchronize(self) -> None:
        """Wait on the host until the device has come to this point."""

    def elapsed_time(self, end: Mark) -> float:
        """Milliseconds from this mark to `end`; both must be timing marks that the device has passed."""


class Lane(Protocol):
    """The copy stream of one device, and its order with the stream that computes."""

    def mark(self, *, timing: bool = False) -> Mark:
        """A mark that has not been set."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy host memory to the device, after the copies before it."""

    def set_copied(self, mark: Mark) -> None:
        """Set the mark after the copies so far."""

    def set_computed(self, mark: Mark) -> None:
        """Set the mark after the computation so far."""

    def copies_wait(self, mark: Mark) -> None:
        """Let later copies wait for the mark."""

    def computation_waits(self, mark: Mark) -> None:
        """Let later computation wait for the mark."""


def lane_for(device: torch.device) -> Lane:
    """A stream of its own where the device has streams."""
    return DirectLane() if device.type in ("cpu", "mps", "meta") else StreamLane(device)


class StreamLane:
    """A copy stream. Copies from pinned memory run while the device computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device)

    def mark(self, *, timing: bool = False) -> Mark:
        return cast("Mark", torch.Event(self.device, enable_timing=timing))

    def copy(self, target: Tensor, source: Tensor) -> None:
        with self.stream:
            target.copy_(source, non_blocking=True)

    def set_copied(self, mark: Mark) -> None:
        _event(mark).record(self.stream)

    def set_computed(self, mark: Mark) -> None:
        _event(mark).record(torch.accelerator.current_stream(self.device))

    def copies_wait(self, mark: Mark) -> None:
        self.stream.wait_event(_event(mark))

    def computation_waits(self, mark: Mark) -> None:
        torch.accelerator.current_stream(self.device).wait_event(_event(mark))


class HostMark:
    """A time on the host's clock."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Mark) -> float:
        return 1000 * (_host(end).seconds - self.seconds)


class DirectLane:
    """Copies at once: for devices without streams, and to test the order of things."""

    def mark(self, *, timing: bool = False) -> Mark:  # noqa: ARG002 — a clock is always there
        return HostMark()

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def set_copied(self, mark: Mark) -> None:
        _host(mark).seconds = time.perf_counter()

    def set_computed(self, mark: Mark) -> None:
        _host(mark).seconds = time.perf_counter()

    def copies_wait(self, mark: Mark) -> None:
        pass

    def computation_waits(self, mark: Mark) -> None:
        pass


def _event(mark: Mark) -> torch.Event:
    return cast("torch.Event", mark)


def _host(mark: Mark) -> HostMark:
    return cast("HostMark", mark)
