"""Why a plan is as it is, and why not otherwise, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoflux.hardware.values import Source
from autoflux.models.values import Model
from autoflux.planning.arranging import all_stay
from autoflux.planning.candidates import Candidate
from autoflux.planning.values import (
    Choice,
    Correction,
    Offload,
    Origin,
    Placement,
    Quality,
    Rejected,
    TransferUnit,
    Waiting,
    Wishes,
)
from autoflux.units import format_bytes, format_seconds

_WAITING = {
    Waiting.PINNED: "pinned RAM",
    Waiting.PAGEABLE: "ordinary RAM, as less can be pinned",
    Waiting.DISK: "their files, as RAM is too small",
}


def choices(
    model: Model, wishes: Wishes, backend: str, best: Candidate, others: Sequence[Candidate]
) -> tuple[Choice, ...]:
    """Every decision with its reason."""
    return tuple(_choices(model, wishes, backend, best, others))


def _choices(
    model: Model, wishes: Wishes, backend: str, best: Candidate, others: Sequence[Candidate]
) -> Iterator[Choice]:
    streams = best.offload == Offload.STREAM
    yield _choice("device", best.device, wishes.device, _device_reason(best, others), _origin(best))
    yield _choice("precision", best.way.arithmetic, wishes.precision, _precision_reason(best), Origin.PROFILE)
    if streams:
        yield _choice("weights", _weights(best), wishes.quant, _weights_reason(best, others, wishes))
    yield _choice("offload", best.offload, wishes.offload, _offload_reason(model, best))
    yield _choice("backend", backend, wishes.backend, "the first that is installed")
    yield from _from_runs(best, backend)
    yield _choice("batch", f"up to {best.max_batch}", wishes.batch, "the most pictures of this size that fit at once")
    if streams:
        yield _choice("compiling", _yes(best.way.compiled), wishes.compiled, _compiling_reason(best, others, wishes))
        yield _choice("attention", best.rates.attention, wishes.attention, _attention_reason(best, wishes))
        yield _choice("decode", *_decode(best, wishes))
        yield from _staying(best, wishes)


def _choice(topic: str, value: str, wish: object, reason: str, origin: Origin = Origin.DERIVED) -> Choice:
    if wish is not None:
        return Choice(topic=topic, value=value, reason="you asked for it", origin=Origin.WISH)
    return Choice(topic=topic, value=value, reason=reason, origin=origin)


def _origin(best: Candidate) -> Origin:
    known = best.site.calibration
    if known and known.is_measured(best.device, best.way, best.rates.attention):
        return Origin.CALIBRATED
    return Origin.MEASURED if best.rates.matmul_tflops.source == Source.MEASURED else Origin.PROFILE


def _from_runs(best: Candidate, backend: str) -> Iterator[Choice]:
    """What runs of this model on this machine had to say."""
    known = best.site.calibration
    if known is None:
        return
    if known.tuned and known.tuned.setting == best.setting(backend):
        yield _choice("setting", "tuned", None, known.tuned_words(), Origin.CALIBRATED)
    ran, here = best.rates.correction, known.is_measured(best.device, best.way, best.rates.attention)
    if ran != Correction():
        what = f"blocks take {ran.blocks:.3g} times as long as measured rates alone say"
        guessed = "" if here else "; this way itself has not run, others have"
        reason = f"calibrated on {known.made_at[:10]} from {known.steps} steps: {what}{guessed}"
        yield _choice("prediction", "calibrated", None, reason, Origin.CALIBRATED)


def _yes(condition: bool) -> str:  # noqa: FBT001 — a word for a truth value
    return "yes" if condition else "no"


def _device_reason(best: Candidate, others: Sequence[Candidate]) -> str:
    rate = best.rates.matmul_tflops
    speed = f"{rate.value:.3g} TFLOP/s {rate.source}, {format_seconds(best.seconds_per_image)} a picture"
    elsewhere = [c for c in others if c.device != best.device]
    if not elsewhere:
        return f"the only device, {speed}"
    if not any(c.fits for c in elsewhere):
        nearest = min(elsewhere, key=lambda c: c.missing_bytes)
        devices = ", ".join(sorted({c.device for c in elsewhere}))
        return f"{speed}; {devices} cannot: at best it {nearest.shortfall}"
    return f"the fastest device, {speed}"


def _precision_reason(best: Candidate) -> str:
    if best.preference == 0:
        return f"the first choice of the profile {best.profile.name!r}"
    better = ", ".join(best.profile.precision[: best.preference])
    return f"the profile {best.profile.name!r} prefers {better}, which does not fit"


def _weights(best: Candidate) -> str:
    if not best.way.is_narrow:
        return best.way.storage.value
    return f"{best.way.storage.value}, {'multiplied so' if best.way.native else 'widened at each use'}"


def _weights_reason(best: Candidate, others: Sequence[Candidate], wishes: Wishes) -> str:
    here = [c for c in others if c.device == best.device and c.offload == Offload.STREAM]
    if best.way.is_narrow:
        return _against("with wide weights", best, [c for c in here if not c.way.is_narrow])
    if wishes.quality == Quality.EXACT:
        return "quality 'exact' keeps weights as they are"
    narrow = [c for c in here if c.way.is_narrow]
    if not narrow:
        return f"the profile {best.profile.name!r} has no 8-bit format that pays off"
    return _against("with weights in 8 bits", best, narrow)


def _compiling_reason(best: Candidate, others: Sequence[Candidate], wishes: Wishes) -> str:
    here = [c for c in others if c.device == best.device and c.way.replace(compiled=best.way.compiled) == best.way]
    rivals = [c for c in here if c.offload == best.offload and c.way.compiled != best.way.compiled]
    if not rivals:
        exact = wishes.quality == Quality.EXACT
        return "it changes the last bits, and quality 'exact' allows none" if exact else "nothing here compiles for it"
    what = "without it" if best.way.compiled else "with it, and its time at the start spread over all pictures,"
    return _against(what, best, rivals)


def _against(what: str, best: Candidate, rivals: Sequence[Candidate]) -> str:
    """How much longer a picture takes the other way."""
    fitting = [c for c in rivals if c.fits]
    if not fitting:
        return f"{what} nothing would fit"
    longer = min(c.cost[0] for c in fitting) / best.cost[0]
    return f"{what} a picture takes {longer:.3g} times as long"


def _attention_reason(best: Candidate, wishes: Wishes) -> str:
    if wishes.quality == Quality.EXACT:
        return "torch's own choice: others change the last bits"
    rate = best.rates.attention_tflops
    return f"the fastest, at {rate.value:.3g} TFLOP/s {rate.source}"


def _offload_reason(model: Model, best: Candidate) -> str:
    held = best.arrangement
    if best.offload == Offload.STREAM:
        if held.unit == TransferUnit.LAYER:
            return "not even two blocks fit the device, so layers pass through it one by one"
        if all_stay(model, held):
            return (
                "all blocks fit the device; modulation, which depends on no token, is computed before the steps, so "
                "its weights need not stay"
            )
        return (
            f"{len(held.component('transformer').resident)} of the transformer's blocks fit the device for good, the "
            f"others pass through {format_bytes(held.ring_bytes)} of it while earlier ones compute; they wait in "
            f"{_WAITING[held.component('transformer').waiting]}"
        )
    limit = best.site.vram_limit_bytes
    if best.offload == Offload.COMPONENT:
        return f"all weights together need more than {format_bytes(limit or 0)} of device memory"
    where, need, have = "the device", best.footprint.vram.peak, limit
    if limit is None:
        where, need, have = "RAM", best.footprint.ram_bytes, best.site.ram_limit_bytes
    return f"everything fits {where}: {format_bytes(need)} of {format_bytes(have or 0)}"


def _decode(best: Candidate, wishes: Wishes) -> tuple[str, None, str]:
    held = best.arrangement
    what, why = [], []
    if held.tile_decode:
        what.append("in tiles")
        faster = "a picture takes less time so than whole, which leaves less room for blocks"
        why.append("whole it would not fit" if wishes.quality == Quality.EXACT else faster)
    if held.park_for_decode:
        what.append("parked")
        why.append("the blocks that stay leave the device meanwhile, which costs less than keeping its room free")
    return " and ".join(what) or "whole", None, "; ".join(why) or "there is room for it beside the weights"


def _staying(best: Candidate, wishes: Wishes) -> Iterator[Choice]:
    places = {
        Placement.DEVICE: ("on the device", "there is room for it, and it need not be copied for each picture"),
        Placement.HOST: ("computed by the processor", ""),
    }
    for component in best.arrangement.components:
        if component.placement in places:
            value, reason = places[component.placement]
            wish = True if component.name in (*wishes.keep, *wishes.cpu) else None
            yield _choice(component.name, value, wish, reason)


def rejection(candidate: Candidate, best: Candidate, backend: str) -> Rejected:
    """Why another way was not taken."""
    slower = candidate.cost[0] / best.cost[0]
    reason = f"{slower:.3g} times as long a picture" if slower > 1.005 else "as fast, but takes more memory"
    known = candidate.site.calibration
    if known and known.was_slower(candidate.setting(backend)):
        reason = "it was slower when it ran here"
    if candidate.device == best.device and candidate.preference > best.preference:
        reason = f"less exact than {best.way.arithmetic.value}, which fits"
    return Rejected(
        device=candidate.device,
        offload=candidate.offload,
        precision=candidate.precision,
        native=candidate.way.native,
        compiled=candidate.way.compiled,
        reason=candidate.shortfall or reason,
        seconds_per_image=candidate.seconds_per_image,
        peak_vram_bytes=candidate.footprint.vram.peak,
        peak_ram_bytes=candidate.footprint.ram_bytes,
    )
