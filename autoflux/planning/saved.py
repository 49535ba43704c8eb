"""Plans that were saved: reading one, and whether it still holds."""

from __future__ import annotations

from autoflux.errors import DoesNotFit, PlanUnusable
from autoflux.hardware.values import DeviceKind, Hardware
from autoflux.models.values import Model
from autoflux.planning.values import PLAN_SCHEMA, Plan
from autoflux.units import format_bytes


def read_plan(text: str | bytes, origin: str) -> Plan:
    """The plan in what `plan --save` or `plan --json` wrote.

    Raises:
        DamagedFile: not a plan, damaged, or of another version; the message names `origin`.
    """
    return Plan.from_saved(text, schema=PLAN_SCHEMA, origin=origin, made_by="autoflux plan --save")


def check_plan(plan: Plan, hardware: Hardware, model: Model) -> None:
    """Find out whether a plan made earlier holds for this machine and model, before anything is loaded.

    Raises:
        PlanUnusable: it is of another machine, or of other versions of driver, torch or autoflux; of another model,
            or of the model before one of its files changed; or it is at odds with itself.
        DoesNotFit: what it needs is not free now.
    """
    _check_machine(plan, hardware)
    _check_model(plan, model)
    _check_device(plan, hardware)
    if plan.max_batch < 1:
        raise PlanUnusable(
            f"the plan draws {plan.max_batch} pictures at once", hint="make it anew: `autoflux plan --save FILE`"
        )
    free = hardware.host.available_bytes.value
    if plan.predicted.peak_ram_bytes > free:
        raise _too_much("RAM", plan.predicted.peak_ram_bytes, free)


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
        hint="make it anew: `autoflux plan --save FILE`",
    )


def _check_model(plan: Plan, model: Model) -> None:
    if plan.model_revision != model.revision:
        raise PlanUnusable(
            f"the plan is for {plan.model!r} in revision {plan.model_revision!r}, and {model.name!r} is in revision "
            f"{model.revision!r}: another model, or one of its files changed",
            hint="make it anew: `autoflux plan --save FILE`",
        )
    planned, present = sorted(c.name for c in plan.components), sorted(c.name for c in model.components)
    if planned != present:
        raise PlanUnusable(
            f"the plan places {', '.join(planned)}, and {model.name!r} consists of {', '.join(present)}",
            hint="make it anew: `autoflux plan --save FILE`",
        )
    for part in plan.components:
        count = len(model.component(part.name).blocks)
        if wrong := [index for index in part.resident if not 0 <= index < count]:
            raise PlanUnusable(f"the plan keeps block {wrong[0]} of {part.name!r}, which has {count} blocks")


def _check_device(plan: Plan, hardware: Hardware) -> None:
    kind, _, index = plan.device.partition(":")
    if kind == DeviceKind.CPU:
        return
    known = kind in set(DeviceKind) and (index.isdecimal() or not index)
    accelerator = hardware.accelerator(DeviceKind(kind), int(index or 0)) if known else None
    if accelerator is None:
        raise PlanUnusable(f"the plan is for the device {plan.device!r}, which this machine does not have")
    need, have = plan.predicted.peak_vram_bytes.peak, accelerator.usable_bytes.value
    if need > have:
        raise _too_much(f"memory on {plan.device}", need, have)


def _too_much(what: str, need: int, have: int) -> DoesNotFit:
    return DoesNotFit(
        f"the plan needs {format_bytes(need)} of {what} and {format_bytes(have)} are free now",
        hint="end what takes it, or leave --plan away and let autoflux plan for what is free",
    )
