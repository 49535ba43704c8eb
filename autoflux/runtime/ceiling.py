"""Keeping torch's allocator within what a plan counts on, so that whoever reads the plan can count on it too.

torch keeps what was freed, in pieces that not everything fits into, and takes more of the device for what does not.
Forbidden to take more than so much, it gives pieces back first. That costs a moment only where it is needed, and a plan
that counts wrongly is no reason to fail: the ceiling is lifted then.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from autoflux.models.values import Model
from autoflux.planning.fit import peak_vram_bytes
from autoflux.planning.terms import Offload
from autoflux.planning.values import Plan
from autoflux.units import format_bytes

_log = logging.getLogger(__name__)


class Ceiling:
    """Of the pictures of one plan, on CUDA devices: what is planned, then what the plan may take, then none.

    Limits are the whole process's, so it is only for those that do nothing else: `active` says so.
    """

    def __init__(self, plan: Plan, model: Model, *, active: bool) -> None:
        self._plan, self._model = plan, model
        own = plan.offload == Offload.NATIVE or plan.unified_memory
        self._active = active and plan.device.startswith("cuda") and not own
        # While a graph is recorded nothing can be given back, so what is planned has to be there in one piece.
        self._lifted = 1 if plan.graphs else 0
        self._held_bytes: int | None = None
        self._planned: dict[tuple[int, int, int], int] = {}

    def hold(self, width: int, height: int, batch: int) -> None:
        """Let torch take what so many pictures of that size are planned to."""
        if not self._active:
            return
        limits = (self._planned_bytes(width, height, batch), self._plan.vram_limit_bytes, None)
        self._set(limits[self._lifted])

    def lift(self) -> bool:
        """Allow more from now on, as there was not enough; whether there is more to allow."""
        if not self._active or self._held_bytes is None:
            return False
        held, self._lifted = self._held_bytes, self._lifted + 1
        limit = self._plan.vram_limit_bytes
        if self._lifted == 1 and (limit is None or limit <= held):
            self._lifted = 2
        more = f"up to {format_bytes(limit)} from now on" if self._lifted == 1 and limit else "as much as there is"
        what = f"pictures take more of {self._plan.device} than the {format_bytes(held)} that were planned"
        _log.warning("%s; they may take %s", what, more)
        return True

    def release(self) -> None:
        """Let torch take what it likes."""
        if self._active:
            self._set(None)

    def _planned_bytes(self, width: int, height: int, batch: int) -> int:
        key = (width, height, batch)
        if key not in self._planned:
            self._planned[key] = peak_vram_bytes(self._plan, self._model, width, height, batch)
        return self._planned[key]

    def _set(self, limit_bytes: int | None) -> None:
        torch: Any = sys.modules.get("torch")
        if limit_bytes == self._held_bytes or torch is None or not torch.cuda.is_available():
            return
        total = torch.cuda.mem_get_info(self._plan.device)[1]
        ours = total if limit_bytes is None else max(0, limit_bytes - self._plan.priors.context_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, ours / total), self._plan.device)
        self._held_bytes = limit_bytes
