"""Pinned memory that plans hand on, one to the next: to take 34 GB of it anew takes longer than all that is timed."""

from __future__ import annotations

from collections import defaultdict

import torch

from autoflux.runtime.pinned import PinnedBuffer

MOST_IDLE_BYTES = 48 * 10**9
"""What is kept beyond that is given up: plans that group blocks in other ways have buffers of other sizes."""


class KeptBuffers:
    """Buffers of a device, pinned once. See `autoflux.runtime.pinned.Offer`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: dict[int, list[PinnedBuffer]] = defaultdict(list)
        self._taken: list[PinnedBuffer] = []
        self.idle_bytes = 0
        """What nobody has taken: RAM that no plan asked for."""

    def take(self, nbytes: int) -> PinnedBuffer:
        """One of that size, pinned now if none is idle."""
        if idle := self._idle[nbytes]:
            buffer = idle.pop()
            self.idle_bytes -= nbytes
        else:
            buffer = PinnedBuffer(nbytes, self._device)
        self._taken.append(buffer)
        return buffer

    def take_back(self) -> None:
        """All that was taken is idle again: nothing reads or writes it any more."""
        for buffer in self._taken:
            self._idle[buffer.nbytes].append(buffer)
            self.idle_bytes += buffer.nbytes
        self._taken.clear()
        if self.idle_bytes > MOST_IDLE_BYTES:
            self._idle.clear()
            self.idle_bytes = 0
