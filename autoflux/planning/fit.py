"""What an existing plan has room for."""

from __future__ import annotations

from typing import NamedTuple

from autoflux.errors import DoesNotFit
from autoflux.hardware.values import DeviceKind
from autoflux.models.values import Model
from autoflux.planning.activations import largest_tensor_bytes
from autoflux.planning.footprint import Footprint, footprint
from autoflux.planning.values import Picture, Plan
from autoflux.units import format_bytes


def batch_limit(plan: Plan, model: Model, width: int, height: int) -> int:
    """How many pictures of that size, in pixels, can be drawn at once under the plan's ceilings.

    Raises:
        DoesNotFit: not even one; the message gives need against have.
    """
    fitting = 0
    for batch in range(1, plan.max_batch + 1):
        need = _need(plan, model, _picture(plan, width, height, batch, plan.predicted.picture.steps))
        if shortfall := _shortfall(plan, need):
            if not fitting:
                raise DoesNotFit(f"a picture of {width}x{height} {shortfall}", hint="ask for a smaller picture")
            break
        fitting = batch
    return fitting


class PlannedVram(NamedTuple):
    """Bytes of the device for pictures that are drawn together, the driver's context included."""

    peak: int
    """The most that they are planned to take."""
    stepping: int
    """What steps take."""
    largest_tensor: int
    """Of a step; what torch takes at once may be as large."""


def planned_vram(plan: Plan, model: Model, width: int, height: int, batch: int, steps: int) -> PlannedVram:
    """What so many pictures of that size and effort are planned to take.

    Steps count as far as their modulation is computed beforehand.
    """
    picture = _picture(plan, width, height, batch, steps)
    vram = _need(plan, model, picture).vram
    return PlannedVram(vram.peak, vram.denoise, largest_tensor_bytes(model, plan.arrangement, picture))


def _picture(plan: Plan, width: int, height: int, batch: int, steps: int) -> Picture:
    return plan.predicted.picture.replace(width=width, height=height, batch=batch, steps=steps)


def _need(plan: Plan, model: Model, picture: Picture) -> Footprint:
    kind = DeviceKind(plan.device.partition(":")[0])
    return footprint(model, plan.arrangement, kind, plan.priors, picture, unified_memory=plan.unified_memory)


def _shortfall(plan: Plan, need: Footprint) -> str:
    if plan.vram_limit_bytes is not None and need.vram.peak > plan.vram_limit_bytes:
        have = format_bytes(plan.vram_limit_bytes)
        return f"needs {format_bytes(need.vram.peak)} of device memory and the plan has {have}"
    if need.ram_bytes > plan.ram_limit_bytes:
        return f"needs {format_bytes(need.ram_bytes)} of RAM and the plan has {format_bytes(plan.ram_limit_bytes)}"
    return ""
