"""Plans that were saved: reading one, and whether it still holds."""

from __future__ import annotations

from collections.abc import Iterator

from autoflux.errors import DamagedFile, DoesNotFit, PlanUnusable
from autoflux.hardware.values import Accelerator, DeviceKind, Hardware
from autoflux.models.values import Model
from autoflux.planning.arranging import PLACEMENTS
from autoflux.planning.contradictions import contradictions
from autoflux.planning.footprint import footprint
from autoflux.planning.ranges import in_words, outside
from autoflux.planning.schedule import aligned
from autoflux.planning.streaming import block_kinds, hoists, largest_streamed, pinned_bytes, streamed_bytes
from autoflux.planning.terms import ATTENTIONS, DEFAULT_ATTENTION, TRANSFORMER, Placement, TransferUnit
from autoflux.planning.values import MOST_PICTURES, PLAN_SCHEMA, Plan, Priors
from autoflux.units import PB, format_seconds, told_apart

ANEW = "make it anew: `autoflux plan --save FILE`"

LEAST, MOST = 1e-18, 1e18
"""Of times and rates that others are divided by, and of any number: what is beyond is none of a machine's."""

NEARLY_ALL = 0.999
"""Of the time of steps: the same seconds summed up in another order differ by less."""


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
    yield from (f"priors.{name} {wrong}" for name, wrong in outside(Priors, plan.priors.to_data()))
    for name, number in _numbers(plan.to_data()):
        if not 0 <= number < (PB if name.endswith("_bytes") else MOST):
            yield f"{name} is {in_words(name, number)}"
    yield from _no_time(plan)
    if not 1 <= plan.max_batch <= MOST_PICTURES:
        yield f"max_batch is {plan.max_batch}, and 1 to {MOST_PICTURES} pictures are drawn at once"
    picture = plan.predicted.picture
    for name in ("width", "height", "steps", "text_tokens", "batch"):
        if getattr(picture, name) < 1:
            yield f"predicted.picture.{name} is 0"


def _no_time(plan: Plan) -> Iterator[str]:
    """Times of steps and blocks, and rates of copies, that nothing can have, and that others are divided by."""
    predicted = plan.predicted
    times = {f"block_seconds.{kind}": seconds for kind, seconds in predicted.block_seconds.items()}
    for name, seconds in {"seconds_per_step": predicted.seconds_per_step, **times}.items():
        if seconds < LEAST:
            yield f"predicted.{name} is {seconds}, and nothing is computed in no time"
    if 0 < predicted.copy_gb_per_s < LEAST:
        yield f"predicted.copy_gb_per_s is {predicted.copy_gb_per_s}, and no copy would arrive"


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


def check_plan(plan: Plan, hardware: Hardware, model: Model, machine: str | None = None) -> Plan:
    """Find out whether a plan made earlier holds for the hardware and model, before anything is loaded.

    What comes back is the plan with what its arrangement was found to need, whatever the plan says of it. `machine` is
    what the hardware is called if it is not this machine's.

    Raises:
        PlanUnusable: it is of another machine, or of other versions of driver, torch or autoflux; of another model,
            or of the model before one of its files changed; or it holds a figure that cannot be right.
        DoesNotFit: what it needs is not free now.
    """
    _check_machine(plan, hardware, machine)
    _check_model(plan, model)
    if wrong := next(_absurd(plan), None):
        raise PlanUnusable(f"the plan holds a figure that cannot be right: {wrong}", hint=ANEW)
    accelerator = _accelerator(plan, hardware)
    plan = _reckoned(plan, model, unified_memory=accelerator is not None and accelerator.unified_memory)
    told = plan.predicted
    _check_room("RAM", told.peak_ram_bytes, hardware.host.available_bytes.value, machine)
    if accelerator is not None:
        _check_room(f"memory on {plan.device}", told.peak_vram_bytes.peak, accelerator.usable_bytes.value, machine)
    return plan


def check_consistency(plan: Plan, model: Model) -> None:
    """Find out whether a plan that `check_plan` gave says what goes together, so that it can be told and followed.

    Raises:
        PlanUnusable: it is at odds with itself.
    """
    if wrong := next(_at_odds(plan, model), None):
        raise PlanUnusable(f"the plan is at odds with itself: {wrong}", hint=ANEW)


def _check_machine(plan: Plan, hardware: Hardware, machine: str | None) -> None:
    if plan.fingerprint == hardware.fingerprint:
        return
    if plan.machine is not None and plan.machine == machine:
        raise PlanUnusable(
            f"the plan is for {plan.machine!r} with other memory, or as it was known to another version",
            hint="give --vram and --ram as when it was saved, or make the plan anew",
        )
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


def _accelerator(plan: Plan, hardware: Hardware) -> Accelerator | None:
    """What the plan is for; None is the CPU."""
    if plan.device == DeviceKind.CPU:
        return None
    kind, _, index = plan.device.partition(":")
    known = kind in set(DeviceKind) and (index.isdecimal() or not index)
    accelerator = hardware.accelerator(DeviceKind(kind), int(index or 0)) if known else None
    if accelerator is None:
        raise PlanUnusable(f"the plan is for the device {plan.device!r}, which this machine does not have", hint=ANEW)
    return accelerator


def _at_odds(plan: Plan, model: Model) -> Iterator[str]:
    """What of it excludes each other."""
    yield from (reason for reason, _ in contradictions(plan))
    yield from _streamed_in_part(plan)
    transformer, told = plan.component(TRANSFORMER), plan.predicted
    if transformer.placement != PLACEMENTS[plan.offload]:
        yield f"its offload is {plan.offload.value!r}, and its transformer is placed {transformer.placement.value!r}"
    on_cpu = plan.device == DeviceKind.CPU
    if on_cpu != (plan.vram_limit_bytes is None):
        yield f"it is for {plan.device!r}, and vram_limit_bytes is {plan.vram_limit_bytes}"
    there = ATTENTIONS if plan.device.startswith(DeviceKind.CUDA) else (DEFAULT_ATTENTION,)
    if plan.attention not in there:
        yield f"attention is {plan.attention!r} on {plan.device!r}; there is {', '.join(there)}"
    steps = told.picture.steps * told.seconds_per_step / told.picture.batch
    if told.seconds_per_image < steps * NEARLY_ALL:
        picture = format_seconds(told.seconds_per_image)
        yield f"a picture takes {picture}, and its {told.picture.steps} steps alone {format_seconds(steps)}"
    if transformer.placement == Placement.STREAMED and not told.copy_gb_per_s:
        yield "blocks are streamed, and predicted.copy_gb_per_s is 0"
    if missing := set(block_kinds(model.component(TRANSFORMER))) - set(told.block_seconds):
        yield f"predicted.block_seconds says nothing of {min(missing)} blocks"
    for name, need in (("vram_limit_bytes", told.peak_vram_bytes.peak), ("ram_limit_bytes", told.peak_ram_bytes)):
        limit = getattr(plan, name)
        if limit is not None and need > limit:
            needed, allowed = told_apart(need, limit)
            yield f"it needs {needed}, and its {name} allows {allowed}"


def _streamed_in_part(plan: Plan) -> Iterator[str]:
    """What only a streamed transformer has, in a plan that streams none; and blocks that stay of anything else."""
    placement = plan.component(TRANSFORMER).placement
    streamed = placement == Placement.STREAMED
    for part in plan.components:
        if part.resident and not (streamed and part.name == TRANSFORMER):
            yield f"blocks of {part.name!r} are to stay, and it does not stream block by block in each step"
        if part.placement == Placement.STREAMED and not streamed:
            yield f"{part.name!r} is streamed, and the transformer is not"
    if plan.keep_modulation and not hoists(plan.arrangement):
        yield "keep_modulation is true, and its modulation is not apart from the blocks"
    if streamed:
        return
    said = {
        "compiled": plan.compiled,
        "unit": plan.unit != TransferUnit.BLOCK,
        "block_bytes": plan.block_bytes,
        "ring_bytes": plan.ring_bytes and placement != Placement.NATIVE,
        "park_for_decode": plan.park_for_decode,
    }
    for name in (name for name, is_said in said.items() if is_said):
        yield f"{name} is {getattr(plan, name)}, and its transformer is not streamed"


def _reckoned(plan: Plan, model: Model, *, unified_memory: bool) -> Plan:
    """With what the arrangement takes: the ring is at least as large as one copy."""
    if plan.component(TRANSFORMER).placement == Placement.STREAMED:
        least = aligned(largest_streamed(model, plan.arrangement))
        plan = plan.replace(ring_bytes=max(plan.ring_bytes, least))
    arrangement, kind = plan.arrangement, DeviceKind(plan.device.partition(":")[0])
    need = footprint(model, arrangement, kind, plan.priors, plan.predicted.picture, unified_memory=unified_memory)
    predicted = plan.predicted.replace(
        peak_vram_bytes=need.vram,
        peak_ram_bytes=need.ram_bytes,
        pinned_bytes=pinned_bytes(model, arrangement),
        streamed_bytes=streamed_bytes(model, arrangement),
    )
    return plan.replace(model=model.name, model_path=model.path, unified_memory=unified_memory, predicted=predicted)


def _check_room(what: str, need: int, have: int, machine: str | None) -> None:
    if need <= have:
        return
    needed, there = told_apart(need, have)
    if machine is not None:
        raise DoesNotFit(
            f"the plan needs {needed} of {what} and {machine} has {there} for it",
            hint="leave --plan away and let autoflux plan for what it has",
        )
    raise DoesNotFit(
        f"the plan needs {needed} of {what} and {there} are free now",
        hint="end what takes it, or leave --plan away and let autoflux plan for what is free",
    )
