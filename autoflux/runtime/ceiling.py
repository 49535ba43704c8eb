"""Keeping torch's allocator within what a plan counts on, so that whoever reads the plan can count on it too.

torch keeps what was freed, in pieces that not everything fits into, and takes more of the device for what does not.
Forbidden to take more than so much, it gives pieces back first, and waits for the device to do so. A plan that counts
wrongly is no reason to fail: the ceiling is lifted then.

torch holds the whole of what is asked for against its limit, also where all but the end of it lies in memory that it
has. So the limit leaves steps room for their largest tensor. Without that, pieces were given back and taken again in
each block, and steps of four pictures took up to a third longer (one H200, benchmarks/planning.py). A decode, whose
tensors become larger and larger, gives back once or twice in either case.

How much more than their tensors steps take depends on where there is room when they begin: between what an encode has
left, four pictures took 2.7 to 8.3 times the size of a hidden state beside them (same card). So that is given back, and
all that is planned is taken in one piece, which torch keeps and cuts up. Only where its segments grow and shrink: of
another it could not give back the rest while a part is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from functools import cache, cached_property, partial
from typing import Any

from autoflux.models.values import Model
from autoflux.planning.fit import PlannedVram, planned_vram
from autoflux.planning.terms import Offload
from autoflux.planning.values import Plan
from autoflux.runtime import allocator
from autoflux.runtime.memory import give_back_unused
from autoflux.units import MIB, format_bytes

LEAST_FREE_BYTES = 64 * MIB
"""Of a device on which a limit of ours may be why there was not enough; with less, others have its memory."""

PAGE_BYTES = 20 * MIB
"""torch's segments grow by so much."""

SPARED_BYTES = 2 * PAGE_BYTES
"""Of what is planned, not taken beforehand: for pages that are used in part, and for what the driver takes when kernels
run for the first time (up to 38 MB on one H200)."""

_log = logging.getLogger(__name__)


class Ceiling:
    """Of the pictures of one plan, on CUDA devices: what is planned, then what the plan may take, then what there is.

    Limits are the whole process's, so it is only for those that do nothing else, and open one session at a time:
    `active` says so. There is none where CUDA graphs are replayed, because nothing can be given back while one is
    recorded; and none on Windows, where a device that is full goes on in RAM unless there ever was a limit.
    """

    def __init__(self, plan: Plan, model: Model, *, active: bool) -> None:
        self._plan = plan
        free = plan.offload == Offload.NATIVE or plan.unified_memory or plan.graphs or sys.platform == "win32"
        self._active = active and plan.device.startswith("cuda") and not free
        self._planned = cache(partial(planned_vram, plan, model))
        self._held: PlannedVram | None = None
        self._decoding = self._takes_ahead = False
        self._allowed_bytes: int | None = 0
        """What may be taken where less is planned; None is what there is."""
        self._share: float | None = None
        """Of the device, that torch was last told."""

    @property
    def is_lifted(self) -> bool:
        """Whether pictures needed more than was planned."""
        return self._allowed_bytes != 0

    def begin(self, *, measured: bool = False) -> None:
        """A picture begins: what is done for it before its steps may leave memory in pieces.

        If what it takes is `measured`, torch takes nothing before it is asked for.
        """
        self._takes_ahead = not measured

    def hold(self, width: int, height: int, batch: int, steps: int, *, decoding: bool = False) -> None:
        """Let torch take what so many pictures of that size and effort are planned to, or were given since.

        `decoding` is whether they are decoded next, instead of going a step further.
        """
        if not self._active:
            return
        self._held = planned = self._planned(width, height, batch, steps)
        self._decoding = decoding
        self._tell(self._limit_bytes(planned))
        if self._takes_ahead and not decoding:
            self._takes_ahead = False
            if not self.is_lifted and allocator.segments_grow(os.environ, sys.platform):
                self._take_in_one_piece(planned.stepping - SPARED_BYTES)

    def lift(self) -> bool:
        """Allow more from now on, as there was not enough; whether there is more to allow."""
        if self._held is None or self._allowed_bytes is None or not self._has_room():
            return False
        # The first time what the plan may take, if that is more; then what there is.
        now, limit = self._limit_bytes(self._held) or 0, self._plan.vram_limit_bytes
        self._allowed_bytes = limit if not self.is_lifted and limit and limit > now else None
        self._tell(self._limit_bytes(self._held))
        more = f"up to {format_bytes(self._allowed_bytes)}" if self._allowed_bytes else "what there is"
        taken = (
            f"pictures take more of {self._plan.device} than the {format_bytes(self._held.peak)} that were counted on"
        )
        _log.warning("%s; from now on they may take %s", taken, more)
        return True

    def release(self) -> None:
        """Let torch take what it likes."""
        if self._held is not None:
            self._tell(None)

    def _limit_bytes(self, planned: PlannedVram) -> int | None:
        if self._allowed_bytes is None:
            return None
        stepping = 0 if self._decoding else planned.stepping + planned.largest_tensor
        return max(planned.peak, self._allowed_bytes, stepping)

    def _take_in_one_piece(self, nbytes: int) -> None:
        """Have torch keep so much, the context included: what is there, and all else side by side."""
        torch: Any = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return
        give_back_unused()
        there = self._plan.priors.context_bytes + torch.cuda.memory_reserved(self._index())
        pages = (nbytes - there) // PAGE_BYTES
        if pages > 0:
            with contextlib.suppress(torch.OutOfMemoryError):  # others have it: steps will take less, or say so
                torch.empty(pages * PAGE_BYTES, dtype=torch.uint8, device=self._plan.device)

    def _has_room(self) -> bool:
        free, _ = self._memory()
        return free >= LEAST_FREE_BYTES

    def _tell(self, limit_bytes: int | None) -> None:
        torch: Any = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return
        share = 1.0
        if limit_bytes is not None:
            share = min(1.0, max(0, limit_bytes - self._plan.priors.context_bytes) / self._total_bytes)
        if share != self._share:
            torch.cuda.set_per_process_memory_fraction(share, self._index())
            self._share = share

    @cached_property
    def _total_bytes(self) -> int:
        return self._memory()[1]

    def _memory(self) -> tuple[int, int]:
        """Bytes of the device that nobody has, and all."""
        cuda: Any = sys.modules["torch"].cuda
        free, total = cuda.mem_get_info(self._index())
        return int(free), int(total)

    def _index(self) -> int:
        """Of the device, which a plan written by hand may leave open."""
        torch: Any = sys.modules["torch"]
        index = torch.device(self._plan.device).index
        return int(torch.cuda.current_device() if index is None else index)
