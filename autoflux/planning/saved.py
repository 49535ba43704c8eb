"""Plans that were saved: reading one, and whether it still holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

from autoflux.errors import DamagedFile, DoesNotFit, PlanUnusable
from autoflux.hardware.values import DeviceKind, Hardware
from autoflux.models.values import Model
from autoflux.planning.footprint import Footprint, footprint
from autoflux.planning.schedule import aligned
from autoflux.planning.streaming import largest_streamed
from autoflux.planning.terms import Placement
from autoflux.planning.values import PLAN_SCHEMA, Plan
from autoflux.units import PB, format_bytes

ANEW = "make it anew: `autoflux plan --save FILE`"

MOST_PICTURES = 64
"""At once, which is also the most that `--batch` takes."""


def read_plan(text: str | bytes, origin: str) -> Plan:
    """The plan in what `plan --save` or `plan --json` wrote.

    Raises:
        DamagedFile: not a plan, damaged, of another version, or with figures that no plan has; the message names
            `origin`.
    """
    plan = Plan.from_saved(text, schema=PLAN_SCHEMA, origin=origin, made_by="autoflux plan --save")
    if wrong := next(_absurd(plan), None):
        raise DamagedFile(f"{origin} holds a figure that cannot be right: {wrong}", hint=ANEW)
    return plan


def _absurd(plan: Plan) -> Iterator[str]:
    """What no plan has: numbers that are negative, not finite or beyond any machine, and nothing to draw."""
    for name, number in _numbers(plan.to_data()):
        if not math.isfinite(number) or number < 0:
            yield f"{name} is {number}"
        elif name.endswith("_bytes") and number >= PB:
            yield f"{name} is {format_bytes(number)}"
    if not 1 <= plan.max_batch <= MOST_PICTURES:
        yield f"max_batch is {plan.max_batch}, and 1 to {MOST_PICTURES} pictures are drawn at once"
    picture = plan.predicted.picture
    for name in ("width", "height", "steps", "text_tokens", "batch"):
        if getattr(picture, name) < 1:
            yield f"predicted.picture.{name} is 0"


def _numbers(data: object, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in plain data, each with its way there, such as `predicted.picture.width`."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from _numbers(value, f"{name}[{index}]")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield name, data


def check_plan(plan: Plan, hardware: Hardware, model: Model) -> None:
    """Find out whether a plan made earlier holds for this machine and model, before anything is loaded.

    Raises:
        PlanUnusable: it is of another machine, or of other versions of driver, torch or autoflux; of another model,
            or of the model before one of its files changed; or it is at odds with itself.
        DoesNotFit: what it needs is not free now.
    """
    _check_machine(plan, hardware)
    _check_model(plan, model)
    if wrong := next(_absurd(plan), None):
        raise PlanUnusable(f"the plan holds a figure that cannot be right: {wrong}", hint=ANEW)
    _check_device(plan, hardware, model)


def _check_machine(plan: Plan, hardware: Hardware) -> None:
    if plan.fingerprint == hardware.fingerprint:
        return
    if plan.machine is not None:
        raise PlanUnusable(
            f"the plan is for another machine, {plan.machine!r}, and cannot be run on this one",
            hint="leave --plan away and this machine gets a plan of its own",
        )
    raise PlanUnusable(
        f"the plan is for a machine with the fingerprint {plan.fingerprint!r} and this one has "
        f"{hardware.fingerprint!r}: another machine, or other versions of driver, torch or autoflux",
        hint=ANEW,
    )


def _check_model(plan: Plan, model: Model) -> None:
    if plan.model_revision != model.revision:
        raise PlanUnusable(
            f"the plan is for {plan.model!r} in revision {plan.model_revision!r}, and {model.name!r} is in revision "
            f"{model.revision!r}: another model, or one of its files changed",
            hint=ANEW,
        )
    planned, present = sorted(c.name for c in plan.components), sorted(c.name for c in model.components)
    if planned != present:
        raise PlanUnusable(
            f"the plan places {', '.join(planned)}, and {model.name!r} consists of {', '.join(present)}",
            hint=ANEW,
        )
    for part in plan.components:
        count = len(model.component(part.name).blocks)
        if wrong := [index for index in part.resident if not 0 <= index < count]:
            raise PlanUnusable(f"the plan keeps block {wrong[0]} of {part.name!r}, which has {count} blocks")
        if len(set(part.resident)) < len(part.resident):
            raise PlanUnusable(f"the plan keeps a block of {part.name!r} twice", hint=ANEW)


def _check_device(plan: Plan, hardware: Hardware, model: Model) -> None:
    """Whether what the plan says it needs, and what it arranges does need, is there and free now."""
    kind, _, index = plan.device.partition(":")
    known = kind in set(DeviceKind) and (index.isdecimal() or not index)
    on_cpu = plan.device == DeviceKind.CPU
    accelerator = hardware.accelerator(DeviceKind(kind), int(index or 0)) if known and not on_cpu else None
    if accelerator is None and not on_cpu:
        raise PlanUnusable(f"the plan is for the device {plan.device!r}, which this machine does not have")
    reckoned = _reckoned(plan, model, DeviceKind(kind))
    need, free = max(plan.predicted.peak_ram_bytes, reckoned.ram_bytes), hardware.host.available_bytes.value
    if need > free:
        raise _too_much("RAM", need, free)
    need = max(plan.predicted.peak_vram_bytes.peak, reckoned.vram.peak)
    if accelerator is not None and need > (have := accelerator.usable_bytes.value):
        raise _too_much(f"memory on {plan.device}", need, have)


def _reckoned(plan: Plan, model: Model, kind: DeviceKind) -> Footprint:
    """What the arrangement takes, whatever the plan says of it: the ring is at least as large as one copy."""
    arrangement = plan.arrangement
    if plan.component("transformer").placement == Placement.STREAMED:
        least = aligned(largest_streamed(model, arrangement))
        arrangement = arrangement.replace(ring_bytes=max(plan.ring_bytes, least))
    return footprint(model, arrangement, kind, plan.priors, plan.predicted.picture, unified_memory=plan.unified_memory)


def _too_much(what: str, need: int, have: int) -> DoesNotFit:
    return DoesNotFit(
        f"the plan needs {format_bytes(need)} of {what} and {format_bytes(have)} are free now",
        hint="end what takes it, or leave --plan away and let autoflux plan for what is free",
    )
