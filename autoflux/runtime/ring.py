"""The device memory that streamed weights pass through, and who has it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from autoflux.planning.schedule import aligned
from autoflux.runtime.lanes import Lane, lane_for


class Tenant(Protocol):
    """Uses a ring until someone else does."""

    def forget(self) -> None:
        """What was brought is gone."""


class Arena:
    """One allocation of device memory for weights: those that stay from the front, the ring behind them.

    Every component of a pipeline streams through the same ring, in its phase.
    """

    def __init__(self, device: torch.device, *, resident_bytes: int, ring_bytes: int, lane: Lane | None = None) -> None:
        # Outside of inference mode, so that views of it may become parameters there and elsewhere.
        with torch.inference_mode(mode=False):
            self.memory = torch.empty(aligned(resident_bytes) + aligned(ring_bytes), dtype=torch.uint8, device=device)
        self.device = device
        self._resident = self.memory[: aligned(resident_bytes)]
        self._taken: list[Tensor] = []
        self.ring = Ring(self.memory[aligned(resident_bytes) :], lane or lane_for(device))

    @property
    def nbytes(self) -> int:
        """Device memory it takes."""
        return self.memory.numel()

    def take(self, nbytes: int) -> Tensor:
        """Room for weights that stay.

        Raises:
            ValueError: more is taken than the arena was made for.
        """
        begin = max((memory.storage_offset() + memory.numel() for memory in self._taken), default=0)
        end = begin + aligned(nbytes)
        if end > self._resident.numel():
            raise ValueError(f"{end} bytes of resident weights in an arena made for {self._resident.numel()}")
        self._taken.append(self._resident[begin:end])
        return self._taken[-1]

    def give_back(self, memory: Tensor) -> None:
        """Undo a `take`. The room is taken again once what lies behind it has been given back too."""
        self._taken = [taken for taken in self._taken if taken is not memory]


class Ring:
    """Device bytes lent to one tenant at a time."""

    def __init__(self, memory: Tensor, lane: Lane) -> None:
        self.memory = memory
        self.lane = lane
        self._tenant: Tenant | None = None
        self._handed_over = lane.mark()

    def held_by(self, tenant: Tenant) -> bool:
        return self._tenant is tenant

    def lend(self, tenant: Tenant | None) -> None:
        """Take the ring from whoever has it. Copies wait for what is computing now, which may still read it."""
        if self._tenant is not None and self._tenant is not tenant:
            self._tenant.forget()
        self._tenant = tenant
        self.clear()

    def clear(self) -> None:
        """Let all of the ring be written again, once what computes now is done."""
        self.lane.set_computed(self._handed_over)
        self.lane.copies_wait(self._handed_over)
