"""Keeping torch's allocator within what a plan counts on, so that whoever reads the plan can count on it too.

torch keeps what was freed, in pieces that not everything fits into, and takes more of the device for what does not.
Forbidden to take more than so much, it gives pieces back first, and waits for the device to do so. A plan that counts
wrongly is no reason to fail: the ceiling is lifted then.

torch holds the whole of what is asked for against its limit, also where all but the end of it lies in memory that it
has. So while steps are done the limit is what is planned and their largest tensor on top of it. At what is planned, all
pieces were given back and taken again in each block: steps of four pictures took up to a third longer (one H200,
benchmarks/planning.py). A decode, whose tensors become larger and larger, gives back once or twice in either case, and
takes less at what is planned.
"""

from __future__ import annotations

import logging
import sys
from functools import cache, partial
from typing import Any

from autoflux.models.values import Model
from autoflux.planning.fit import planned_vram
from autoflux.planning.terms import Offload
from autoflux.planning.values import Plan
from autoflux.units import MIB, format_bytes

LEAST_FREE_BYTES = 64 * MIB
"""Of a device on which a limit of ours may be why there was not enough; with less, others have its memory."""

_log = logging.getLogger(__name__)


class Ceiling:
    """Of the pictures of one plan, on CUDA devices: what is planned, then what the plan may take, then what there is.

    Limits are the whole process's, so it is only for those that do nothing else: `active` says so. There is none where
    CUDA graphs are replayed, because nothing can be given back while one is recorded; and none on Windows, where a
    device that is full goes on in RAM unless there ever was a limit.
    """

    def __init__(self, plan: Plan, model: Model, *, active: bool) -> None:
        self._plan = plan
        free = plan.offload == Offload.NATIVE or plan.unified_memory or plan.graphs or sys.platform == "win32"
        self._active = active and plan.device.startswith("cuda") and not free
        self.is_lifted = False
        """Whether pictures needed more than was planned."""
        self._held_bytes: int | None = None
        self._largest_bytes = 0
        self._planned = cache(partial(planned_vram, plan, model))

    def hold(self, width: int, height: int, batch: int, steps: int, *, decoding: bool = False) -> None:
        """Let torch take what so many pictures of that size and effort are planned to, unless they were given more.

        `decoding` is whether they are decoded next, instead of going a step further.
        """
        if self._active and not self.is_lifted:
            peak, largest = self._planned(width, height, batch, steps)
            self._set(peak, 0 if decoding else largest)

    def lift(self) -> bool:
        """Allow more from now on, as there was not enough; whether there is more to allow."""
        held, limit = self._held_bytes, self._plan.vram_limit_bytes
        if held is None or not self._has_room():
            return False
        # The first time what the plan may take, if that is more; then what there is.
        limit = limit if not self.is_lifted and limit and limit > held else None
        self.is_lifted = True
        self._set(limit, self._largest_bytes)
        more = f"up to {format_bytes(limit)}" if limit else "what there is"
        taken = f"pictures take more of {self._plan.device} than the {format_bytes(held)} that were counted on"
        _log.warning("%s; from now on they may take %s", taken, more)
        return True

    def release(self) -> None:
        """Let torch take what it likes."""
        if self._held_bytes is not None:
            self._set(None)

    def _has_room(self) -> bool:
        cuda: Any = sys.modules["torch"].cuda
        return bool(cuda.mem_get_info(self._index())[0] >= LEAST_FREE_BYTES)

    def _set(self, limit_bytes: int | None, largest_bytes: int = 0) -> None:
        torch: Any = sys.modules.get("torch")
        same = (limit_bytes, largest_bytes) == (self._held_bytes, self._largest_bytes)
        if same or torch is None or not torch.cuda.is_available():
            return
        total = torch.cuda.mem_get_info(self._index())[1]
        ours = total
        if limit_bytes is not None:
            ours = max(0, limit_bytes + largest_bytes - self._plan.priors.context_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, ours / total), self._index())
        self._held_bytes, self._largest_bytes = limit_bytes, largest_bytes

    def _index(self) -> int:
        """Of the device, which a plan written by hand may leave open."""
        torch: Any = sys.modules["torch"]
        index = torch.device(self._plan.device).index
        return int(torch.cuda.current_device() if index is None else index)
