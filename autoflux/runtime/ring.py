"""The device memory that streamed weights pass through, and who has it."""

from __future__ import annotations

from collections.abc import Callable
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
    """Device memory for weights, allocated once: those that stay, and a ring for those that pass through.

    Every component of a pipeline streams through the same ring, in its phase. An arena that `parks` can give the memory
    of what stays to others for a while: whoever has weights there keeps a copy on the host to bring back.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        resident_bytes: int,
        ring_bytes: int,
        parks: bool = False,
        lane: Lane | None = None,
    ) -> None:
        # Outside of inference mode, so that views of it may become parameters there and elsewhere.
        with torch.inference_mode(mode=False):
            self.resident = torch.empty(aligned(resident_bytes), dtype=torch.uint8, device=device)
            ring = torch.empty(aligned(ring_bytes), dtype=torch.uint8, device=device)
        self.device = device
        self.parks = parks
        self.ring = Ring(ring, lane or lane_for(device))
        self._taken: list[Tensor] = []
        self._bring_back: list[Callable[[], None]] = []
        self._parked = False

    @property
    def nbytes(self) -> int:
        """Device memory it takes when nothing is parked."""
        return self.resident.numel() + self.ring.memory.numel()

    def take(self, nbytes: int) -> Tensor:
        """Room for weights that stay.

        Raises:
            ValueError: more is taken than the arena was made for.
        """
        begin = max((memory.storage_offset() + memory.numel() for memory in self._taken), default=0)
        end = begin + aligned(nbytes)
        if end > self.resident.numel():
            raise ValueError(f"{end} bytes of resident weights in an arena made for {self.resident.numel()}")
        self._taken.append(self.resident[begin:end])
        return self._taken[-1]

    def give_back(self, memory: Tensor) -> None:
        """Undo a `take`. The room is taken again once what lies behind it has been given back too."""
        self._taken = [taken for taken in self._taken if taken is not memory]

    def when_unparked(self, bring_back: Callable[[], None]) -> None:
        """Call `bring_back` when what stays has its memory again, without what was in it."""
        self._bring_back.append(bring_back)

    def leave(self, bring_back: Callable[[], None]) -> None:
        """Undo `when_unparked`."""
        self._bring_back.remove(bring_back)

    def park(self) -> None:
        """Give the memory of what stays to others. Nothing may be computed with those weights until `unpark`."""
        assert self.parks, "an arena whose tenants keep no copies"  # noqa: S101
        if not self._parked:
            # Views, such as the parameters of modules, stay as they are and find the new memory afterwards.
            self.resident.untyped_storage().resize_(0)
            self._parked = True

    def unpark(self) -> None:
        """Take memory for what stays again, and let everyone bring their weights back.

        Raises:
            torch.OutOfMemoryError: others still have it.
        """
        if self._parked:
            self.resident.untyped_storage().resize_(self.resident.numel())
            self._parked = False
            self.ring.clear()
            for bring_back in self._bring_back:
                bring_back()


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
