"""Choosing the way to run: every candidate is measured by footprint and timeline, the fastest that fits is taken."""

from __future__ import annotations

from collections.abc import Sequence

from autoflux.errors import DoesNotFit, UnknownName
from autoflux.hardware.values import DeviceKind, Hardware, Source
from autoflux.models.request import Request, check
from autoflux.models.values import Model
from autoflux.planning.candidates import Candidate, candidates
from autoflux.planning.streaming import pinned_bytes
from autoflux.planning.timeline import FROM_PROFILE
from autoflux.planning.values import (
    Choice,
    Offload,
    Origin,
    Picture,
    Plan,
    Predicted,
    Profile,
    Rejected,
    Waiting,
    Wishes,
)
from autoflux.units import format_bytes, format_seconds


def make_plan(
    hardware: Hardware, model: Model, profiles: Sequence[Profile], wishes: Wishes, backends: Sequence[str]
) -> Plan:
    """The fastest way to run `model` on `hardware` that keeps to the `wishes`; of equals, the smaller.

    `backends` are the names that work here, the preferred one first.

    Raises:
        DoesNotFit: no way fits; the message gives need against have.
        DeviceUnavailable: the wished device is not there.
        ContradictoryWishes: two wishes exclude each other.
        UnknownName: no backend or profile of that name.
        InvalidRequest: the wished size or steps are out of the model's limits.
    """
    picture = _picture(model, wishes)
    backend = _backend(wishes, backends)
    tried = candidates(hardware, model, profiles, wishes, picture)
    fitting = _preferred([c for c in tried if c.fits])
    if not fitting:
        raise _refusal(model, tried, wishes)
    best = min(fitting, key=lambda c: (c.seconds_per_image, c.footprint.vram.peak, c.footprint.ram_bytes))
    return _plan(hardware, model, wishes, backend, best, [c for c in tried if c is not best])


def _preferred(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Of each device only the best precision that fits: a worse one is for want of memory, not for speed."""
    best = {c.device: min(o.preference for o in fitting if o.device == c.device) for c in fitting}
    return [c for c in fitting if c.preference == best[c.device]]


def _picture(model: Model, wishes: Wishes) -> Picture:
    defaults = model.defaults
    picture = Picture(
        width=defaults.width if wishes.width is None else wishes.width,
        height=defaults.height if wishes.height is None else wishes.height,
        steps=defaults.steps if wishes.steps is None else wishes.steps,
        text_tokens=defaults.text_tokens,
    )
    request = Request(
        prompt="a picture", seed=0, steps=picture.steps, guidance=0, width=picture.width, height=picture.height
    )
    check(request, model.limits)
    return picture


def _backend(wishes: Wishes, backends: Sequence[str]) -> str:
    if wishes.backend is None:
        if not backends:
            raise UnknownName("backend", "any", (), hint="pip install diffusers")
        return backends[0]
    if wishes.backend not in backends:
        raise UnknownName("backend", wishes.backend, backends)
    return wishes.backend


def _plan(
    hardware: Hardware, model: Model, wishes: Wishes, backend: str, best: Candidate, others: Sequence[Candidate]
) -> Plan:
    predicted = Predicted(
        picture=best.picture,
        seconds_per_step=best.timeline.step,
        seconds_per_image=best.seconds_per_image,
        seconds_to_start=best.timeline.start,
        peak_vram_bytes=best.footprint.vram,
        peak_ram_bytes=best.footprint.ram_bytes,
        pinned_bytes=pinned_bytes(model, best.arrangement),
    )
    return Plan(
        model=model.name,
        model_path=model.path,
        model_revision=model.revision,
        fingerprint=hardware.fingerprint,
        profile=best.profile.name,
        priors=best.profile.priors,
        backend=backend,
        device=best.device,
        unified_memory=best.unified_memory,
        offload=best.offload,
        components=best.arrangement.components,
        waiting=best.arrangement.waiting,
        ring_bytes=best.arrangement.ring_bytes,
        hoist_modulation=best.offload == Offload.STREAM,
        tile_decode=best.arrangement.tile_decode,
        park_for_decode=best.arrangement.park_for_decode,
        max_batch=best.max_batch,
        vram_limit_bytes=best.vram_limit_bytes,
        ram_limit_bytes=best.ram_limit_bytes,
        predicted=predicted,
        choices=_choices(wishes, backend, best, others),
        rejected=tuple(_rejection(c, best) for c in others),
        warnings=_warnings(best, wishes),
    )


def _choices(wishes: Wishes, backend: str, best: Candidate, others: Sequence[Candidate]) -> tuple[Choice, ...]:
    def choice(topic: str, value: str, wish: object, reason: str, origin: Origin) -> Choice:
        if wish is not None:
            return Choice(topic=topic, value=value, reason="you asked for it", origin=Origin.WISH)
        return Choice(topic=topic, value=value, reason=reason, origin=origin)

    rate = best.rates.matmul_tflops
    origin = Origin.MEASURED if rate.source == Source.MEASURED else Origin.PROFILE
    speed = f"{rate.value:.3g} TFLOP/s {rate.source}, {format_seconds(best.seconds_per_image)} a picture"
    return (
        choice("device", best.device, wishes.device, _device_reason(best, others) + f": {speed}", origin),
        choice("precision", best.precision, wishes.precision, _precision_reason(best), Origin.PROFILE),
        choice("offload", best.offload, wishes.offload, _offload_reason(best), Origin.DERIVED),
        choice("backend", backend, wishes.backend, "the first that is installed", Origin.DERIVED),
        *_decode_choice(best),
        Choice(
            topic="batch",
            value=f"up to {best.max_batch}",
            reason="the most pictures of this size that fit at once",
            origin=Origin.DERIVED,
        ),
    )


def _decode_choice(best: Candidate) -> tuple[Choice, ...]:
    held = best.arrangement
    if not held.streamed:
        return ()
    what, why = [], []
    if held.tile_decode:
        what.append("in tiles")
        why.append("whole it would not fit, or leave so little room for blocks that a picture took much longer")
    if held.park_for_decode:
        what.append("parked")
        why.append("the blocks that stay leave the device meanwhile, which costs less than keeping its room free")
    value, reason = " and ".join(what) or "whole", "; ".join(why) or "there is room for it beside the weights"
    return (Choice(topic="decode", value=value, reason=reason, origin=Origin.DERIVED),)


def _device_reason(best: Candidate, others: Sequence[Candidate]) -> str:
    rest = {c.device for c in others} - {best.device}
    if not rest:
        return "the only device"
    unfit = [c for c in others if c.device in rest and not c.fits]
    if len(unfit) == len([c for c in others if c.device in rest]):
        nearest = min(unfit, key=lambda c: c.missing_bytes)
        return f"{', '.join(sorted(rest))} cannot: at best it {nearest.shortfall}"
    return "the fastest device"


def _precision_reason(best: Candidate) -> str:
    if best.preference == 0:
        return f"the first choice of the profile {best.profile.name!r}"
    better = ", ".join(best.profile.precision[: best.preference])
    return f"the profile {best.profile.name!r} prefers {better}, which does not fit"


_WAITING = {
    Waiting.PINNED: "pinned RAM",
    Waiting.PAGEABLE: "ordinary RAM, as less can be pinned",
    Waiting.DISK: "their files, as RAM is too small",
}


def _offload_reason(best: Candidate) -> str:
    if best.offload == Offload.STREAM:
        staying = sum(len(component.resident) for component in best.arrangement.components)
        return (
            f"{staying} of the transformer's blocks fit the device for good, the others pass through "
            f"{format_bytes(best.arrangement.ring_bytes)} of it while earlier ones compute; they wait in "
            f"{_WAITING[best.arrangement.waiting]}"
        )
    if best.offload == Offload.COMPONENT:
        return f"all weights together need more than {format_bytes(best.vram_limit_bytes or 0)} of device memory"
    where = "RAM" if best.vram_limit_bytes is None else "the device"
    need = best.footprint.ram_bytes if best.vram_limit_bytes is None else best.footprint.vram.peak
    have = best.ram_limit_bytes if best.vram_limit_bytes is None else best.vram_limit_bytes
    return f"everything fits {where}: {format_bytes(need)} of {format_bytes(have)}"


def _rejection(candidate: Candidate, best: Candidate) -> Rejected:
    slower = candidate.seconds_per_image / best.seconds_per_image
    reason = f"{slower:.3g} times as long a picture" if slower > 1.005 else "as fast, but takes more memory"
    if candidate.device == best.device and candidate.preference > best.preference:
        reason = f"less exact than {best.precision.value}, which fits"
    return Rejected(
        device=candidate.device,
        offload=candidate.offload,
        precision=candidate.precision,
        reason=candidate.shortfall or reason,
        seconds_per_image=candidate.seconds_per_image,
        peak_vram_bytes=candidate.footprint.vram.peak,
        peak_ram_bytes=candidate.footprint.ram_bytes,
    )


def _warnings(best: Candidate, wishes: Wishes) -> tuple[str, ...]:
    assumed = [
        name
        for name, figure in (
            ("arithmetic rate", best.rates.matmul_tflops),
            ("link bandwidth", best.rates.link_gb_per_s),
            ("disk rate", best.rates.disk_gb_per_s),
        )
        if figure.note == FROM_PROFILE and not (name == "link bandwidth" and best.kind == DeviceKind.CPU)
    ]
    warnings = []
    if assumed:
        warnings.append(f"{', '.join(assumed)} not measured; assumed from the profile {best.profile.name!r}")
    if wishes.vram_bytes is not None and best.vram_limit_bytes is None:
        warnings.append("the ceiling of device memory (--vram) means nothing on the CPU; --ram limits its memory")
    return tuple(warnings)


def _refusal(model: Model, tried: Sequence[Candidate], wishes: Wishes) -> DoesNotFit:
    nearest = min(tried, key=lambda c: c.missing_bytes)
    parts = ", ".join(
        f"{c.name} {format_bytes(model.component(c.name).bytes_as(c.storage))}" for c in nearest.arrangement.components
    )
    wish = "--vram" if nearest.vram_limit_bytes is not None and nearest.missing_vram_bytes > 0 else "--ram"
    limited = wishes.vram_bytes if wish == "--vram" else wishes.ram_bytes
    if limited is not None:
        hint = f"{wish} {format_bytes(limited + nearest.missing_bytes * 1.01).replace(' ', '')} would fit"
    elif wishes.device and wishes.device != "cpu":
        hint = "drop --device to let another device be chosen, or ask for a smaller --size"
    else:
        hint = f"free {format_bytes(nearest.missing_bytes)} more memory, or ask for a smaller --size"
    return DoesNotFit(
        f"{model.name!r} does not fit this machine: on {nearest.device} with offload {nearest.offload.value!r}, "
        f"{nearest.shortfall} (weights: {parts})",
        hint=hint,
    )
