"""Why a plan is as it is, and why not otherwise, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoflux.hardware.values import DeviceKind, Figure, Hardware, Size, Source
from autoflux.models.values import Model
from autoflux.planning.arranging import all_stay
from autoflux.planning.backends import ChosenBackend
from autoflux.planning.candidates import HOST_AHEAD, MAX_BATCH, WORTH_GRAPHS, Candidate
from autoflux.planning.speed import FROM_PROFILE, block_seconds
from autoflux.planning.terms import TRANSFORMER, Offload, Origin, Placement, Quality, TransferUnit, Waiting
from autoflux.planning.values import Alternative, Arrangement, Choice, Correction, Wishes
from autoflux.units import format_bytes, format_number, format_seconds

_WAITING = {
    Waiting.PINNED: "pinned RAM",
    Waiting.PAGEABLE: "ordinary RAM, as less can be pinned",
    Waiting.DISK: "files, as RAM is too small",
}


ASKED = "you asked for it"

SAME = 1.005
"""Times that differ by less are told as the same."""

_NOT_FAR_AHEAD = f"and must be {HOST_AHEAD:g} times as fast to be taken before an accelerator"


def choices(
    hardware: Hardware,
    model: Model,
    wishes: Wishes,
    backend: ChosenBackend,
    best: Candidate,
    others: Sequence[Candidate],
) -> tuple[Choice, ...]:
    """Every decision with its reason."""
    known = _Known(hardware, best, wishes)
    return (*_choices(known, model, wishes, backend, best, others), *_from_packs(best))


class _Known:
    """How what choices rest on is known."""

    def __init__(self, hardware: Hardware, best: Candidate, wishes: Wishes) -> None:
        accelerator, rates = best.site.accelerator, best.rates
        available = hardware.host.available_bytes
        calibration = best.site.calibration
        ran = calibration is not None and calibration.is_measured(best.device, best.way, rates.attention)
        self.arithmetic = Origin.CALIBRATED if ran else origin(rates.matmul_tflops)
        self.speed = (
            Origin.CALIBRATED if ran else origin(rates.matmul_tflops, rates.narrow_tflops, rates.attention_tflops)
        )
        self.attention = origin(rates.attention_tflops)
        self.memory = origin(available, accelerator.usable_bytes if accelerator else None)
        self.streaming = max(self.memory, self.speed, origin(rates.link_gb_per_s), key=list(Origin).index)
        self.exact = wishes.quality == Quality.EXACT

    def unless_exact(self, known: Origin) -> Origin:
        """A wish, where the quality that was asked for leaves nothing else."""
        return Origin.WISH if self.exact else known


def origin(*figures: Figure | Size | None) -> Origin:
    """Of the one that is known least; None is left out."""
    found = (
        Origin.PRIOR if figure.note == FROM_PROFILE else _ORIGINS[figure.source]
        for figure in figures
        if figure is not None
    )
    return max(found, key=list(Origin).index, default=Origin.PRIOR)


_ORIGINS = {Source.MEASURED: Origin.MEASURED, Source.REPORTED: Origin.REPORTED, Source.ASSUMED: Origin.ASSUMED}


def _from_packs(best: Candidate) -> Iterator[Choice]:
    used = [planned for planned in best.arrangement.components if planned.packed_bytes]
    if used:
        size = format_bytes(sum(planned.packed_bytes for planned in used))
        names = ", ".join(planned.name for planned in used)
        yield _choice("packs", names, None, f"{size}, read as they are", Origin.REPORTED)


def _choices(
    known: _Known, model: Model, wishes: Wishes, backend: ChosenBackend, best: Candidate, others: Sequence[Candidate]
) -> Iterator[Choice]:
    streams = best.offload == Offload.STREAM
    yield _choice("device", best.device, wishes.device, _device_reason(best, others), known.arithmetic)
    yield _choice("precision", best.way.arithmetic, wishes.precision, _precision_reason(best), Origin.PRIOR)
    if streams:
        reason = _weights_reason(best, others, wishes)
        yield _choice("weights", weights(best), wishes.quant, reason, known.unless_exact(known.streaming))
    offload_known = known.streaming if streams else known.memory
    yield _choice("offload", best.offload, wishes.offload, _offload_reason(model, best, wishes), offload_known)
    yield _choice("backend", backend.name, wishes.backend, backend.reason, Origin.REPORTED)
    yield from _from_runs(best, backend.name)
    fit = "the most pictures of this size that fit at once"
    most = "more gain nothing, and each waits longer" if best.max_batch == MAX_BATCH else fit
    yield _choice("batch", f"up to {best.max_batch}", wishes.batch, most, known.memory)
    if streams:
        yield from _streamed_choices(known, model, wishes, best, others)


def _streamed_choices(
    known: _Known, model: Model, wishes: Wishes, best: Candidate, others: Sequence[Candidate]
) -> Iterator[Choice]:
    """What is to be decided only where weights are streamed."""
    reason = _compiling_reason(best, others, wishes)
    yield _choice("compiling", yes(best.way.compiled), wishes.compiled, reason, known.unless_exact(known.speed))
    if best.kind == DeviceKind.CUDA:
        reason = _graphs_reason(model, best)
        yield _choice("CUDA graphs", yes(best.way.graphs), wishes.graphs, reason, known.speed)
    reason = _attention_reason(best, wishes)
    attention = known.unless_exact(known.attention)
    yield _choice("attention", best.rates.attention, wishes.attention, reason, attention)
    size, reason = _block_size(best)
    yield _choice("block size", size, wishes.unit or wishes.block_bytes, reason, known.memory)
    yield _choice("decode", decoding(best.arrangement), None, _decode_reason(best, wishes), known.memory)
    yield from _staying(best, wishes, known.streaming)


def _block_size(best: Candidate) -> tuple[str, str]:
    """What one copy moves, and why."""
    held = best.arrangement
    if held.block_bytes:
        return f"blocks up to {format_bytes(held.block_bytes)}", ASKED
    if held.unit == TransferUnit.LAYER:
        return "a layer", "whole blocks would not fit, or leave less room for the rest"
    return "a block", "larger copies need a larger ring, smaller ones cannot leave out the modulation"


def _choice(topic: str, value: str, wish: object, reason: str, known: Origin) -> Choice:
    if wish is not None:
        return Choice(topic=topic, value=value, reason=ASKED, origin=Origin.WISH)
    return Choice(topic=topic, value=value, reason=reason, origin=known)


def _from_runs(best: Candidate, backend: str) -> Iterator[Choice]:
    """What runs of this model on this machine had to say."""
    known = best.site.calibration
    if known is None:
        return
    if known.tuned and known.tuned.setting == best.setting(backend):
        yield _choice("setting", "tuned", None, known.tuned_words(), Origin.CALIBRATED)
    ran, here = best.rates.correction, known.is_measured(best.device, best.way, best.rates.attention)
    if ran != Correction():
        what = f"blocks take {format_number(ran.blocks)} times as long as measured rates alone say"
        guessed = "" if here else "; this way itself has not run, others have"
        reason = f"calibrated on {known.made_at[:10]} from {known.steps} steps: {what}{guessed}"
        yield _choice("prediction", "calibrated", None, reason, Origin.CALIBRATED)


def yes(condition: bool) -> str:  # noqa: FBT001
    """A word for a truth value."""
    return "yes" if condition else "no"


def _device_reason(best: Candidate, others: Sequence[Candidate]) -> str:
    rate = best.rates.matmul_tflops
    speed = f"{format_number(rate.value)} TFLOP/s {rate.source}, {format_seconds(best.seconds_per_image)} a picture"
    elsewhere = [c for c in others if c.device != best.device]
    if not elsewhere:
        return f"the only one for what was asked, {speed}"
    if not any(c.fits for c in elsewhere):
        nearest = min(elsewhere, key=lambda c: c.missing_bytes)
        devices = ", ".join(sorted({c.device for c in elsewhere}))
        return f"{speed}; {devices} cannot: at best it {nearest.shortfall}"
    faster = [c for c in elsewhere if c.fits and _is_host_before(c, best)]
    if faster:
        instead = format_seconds(min(c.seconds_per_image for c in faster))
        return f"{speed}; the processor is predicted to take {instead}, {_NOT_FAR_AHEAD}"
    return f"the fastest device, {speed}"


def _is_host_before(candidate: Candidate, best: Candidate) -> bool:
    """Whether it would be faster, and is left out because it takes the processor."""
    on_host = candidate.kind == DeviceKind.CPU != best.kind
    return on_host and candidate.seconds_per_image < best.seconds_per_image


def _precision_reason(best: Candidate) -> str:
    if best.preference == 0:
        return f"the first choice of the profile {best.profile.name!r}"
    better = ", ".join(best.profile.precision[: best.preference])
    return f"the profile {best.profile.name!r} prefers {better}, which does not fit"


def weights(best: Candidate) -> str:
    """Format of the transformer's weights, and how they are computed with."""
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
    same = {"compiled": best.way.compiled, "graphs": best.way.graphs}
    here = [c for c in others if c.device == best.device and c.way.replace(**same) == best.way]
    rivals = [c for c in here if c.offload == best.offload and c.way.compiled != best.way.compiled]
    if not rivals:
        exact = wishes.quality == Quality.EXACT
        return "it changes the last bits, and quality 'exact' allows none" if exact else "nothing here compiles for it"
    return _against("without it" if best.way.compiled else "with it", best, rivals)


def _graphs_reason(model: Model, best: Candidate) -> str:
    priors, way = best.profile.priors, best.way
    if best.arrangement.unit == TransferUnit.LAYER:
        return "a graph holds a whole block, and layers are brought one by one"
    launched, replayed = (
        block_seconds(model, best.rates, priors, best.picture, way.replace(graphs=graphs)) for graphs in (False, True)
    )
    longer = sum(launched.values()) / sum(replayed.values())
    if way.graphs:
        times = format_number(longer)
        return f"launched one by one, the operations of a block take the host {times} times as long as the device"
    if longer > WORTH_GRAPHS:
        return "the device would compute faster, but the copies would not, or their memory is worth more to weights"
    return "the host launches operations faster than the device computes them"


def _against(what: str, best: Candidate, rivals: Sequence[Candidate]) -> str:
    """How much longer a picture takes the other way, or what that takes more to start."""
    fitting = [c for c in rivals if c.fits]
    if not fitting:
        return f"{what} nothing would fit"
    rival = min(fitting, key=lambda c: c.cost)
    return f"{what} a picture takes {_as_long(rival, best)}{_later(rival, best)}"


def _as_long(rival: Candidate, best: Candidate) -> str:
    times = format_number(rival.seconds_per_image / best.seconds_per_image)
    return "as long" if times == "1" else f"{times} times as long"


def _later(rival: Candidate, best: Candidate) -> str:
    """What it takes more to start, where that is why it was not taken: pictures alone take no longer."""
    longer = rival.seconds_per_image > SAME * best.seconds_per_image
    if longer or rival.timeline.start <= SAME * best.timeline.start:
        return ""
    return f", and {format_seconds(rival.timeline.start - best.timeline.start)} more to start"


def _attention_reason(best: Candidate, wishes: Wishes) -> str:
    if wishes.quality == Quality.EXACT:
        return "torch's own choice: others change the last bits"
    rate = best.rates.attention_tflops
    return f"the fastest, at {format_number(rate.value)} TFLOP/s {rate.source}"


def _offload_reason(model: Model, best: Candidate, wishes: Wishes) -> str:
    limit = best.site.vram_limit_bytes
    if best.offload == Offload.STREAM:
        return _stream_reason(model, best, wishes)
    if best.offload == Offload.COMPONENT:
        return f"all weights together need more than {format_bytes(limit or 0)} of device memory"
    where, need, have = "the device", best.footprint.vram.peak, limit
    if limit is None:
        where, need, have = "RAM", best.footprint.ram_bytes, best.site.ram_limit_bytes
    return f"everything fits {where}: {format_bytes(need)} of {format_bytes(have or 0)}"


def _stream_reason(model: Model, best: Candidate, wishes: Wishes) -> str:
    held = best.arrangement
    if all_stay(model, held):
        weights = "stay for that too" if held.keep_modulation else "need not stay"
        return (
            "all blocks fit the device; modulation, which depends on no token, is computed before the steps, and its "
            f"weights {weights}"
        )
    transformer = held.component(TRANSFORMER)
    ring, staying = format_bytes(held.ring_bytes), len(transformer.resident)
    if held.unit == TransferUnit.LAYER:
        why = "as you asked" if wishes.unit else "as whole blocks would not fit, or leave less room"
        passing = f"layers pass through {ring} of the device one by one, {why}"
    elif held.block_bytes:
        passing = f"blocks pass through {ring} of the device several at once, as you asked, so none of them stays there"
    elif staying:
        fit = "fits" if staying == 1 else "fit"
        passing = (
            f"{staying} of the transformer's blocks {fit} the device for good, the others pass through {ring} of it "
            "while earlier ones compute"
        )
    else:
        passing = (
            f"none of the transformer's blocks fits the device for good, so all pass through {ring} of it while "
            "earlier ones compute"
        )
    return f"{passing}; they wait in {_WAITING[transformer.waiting]}"


def decoding(arrangement: Arrangement) -> str:
    """How pictures are decoded, in a few words."""
    ways = (("in tiles", arrangement.tile_decode), ("parked", arrangement.park_for_decode))
    return " and ".join(name for name, done in ways if done) or "whole"


def _decode_reason(best: Candidate, wishes: Wishes) -> str:
    why = []
    if best.arrangement.tile_decode:
        faster = "a picture takes less time so than whole, which leaves less room for blocks"
        why.append("whole it would not fit" if wishes.quality == Quality.EXACT else faster)
    if best.arrangement.park_for_decode:
        why.append("the blocks that stay leave the device meanwhile, which costs less than keeping its room free")
    return "; ".join(why) or "there is room for it beside the weights"


def _staying(best: Candidate, wishes: Wishes, known: Origin) -> Iterator[Choice]:
    places = {
        Placement.STREAMED: ("streamed", "on the device it would take room that makes more of streamed blocks"),
        Placement.DEVICE: ("on the device", "there is room for it, and it need not be copied for each picture"),
        Placement.HOST: ("computed by the processor", ""),
    }
    for component in best.arrangement.components:
        if component.placement in places and component.name != "transformer":
            value, reason = places[component.placement]
            wish = True if component.name in (*wishes.keep, *wishes.cpu) else None
            yield _choice(component.name, value, wish, reason, known)


def rejection(candidate: Candidate, best: Candidate, backend: ChosenBackend) -> Alternative:
    """Another way, and why it was not taken when that backend builds it."""
    as_long, later = f"{_as_long(candidate, best)} a picture", _later(candidate, best)
    reason = f"{as_long}{later}"
    if not later and candidate.seconds_per_image <= SAME * best.seconds_per_image:
        reason = "as fast, but takes more memory"
    if _is_host_before(candidate, best):
        reason = f"{as_long}, {_NOT_FAR_AHEAD}"
    known = candidate.site.calibration
    if known and known.was_slower(candidate.setting(backend.name)):
        reason = "it was slower when it ran here"
    if candidate.device == best.device and candidate.preference > best.preference:
        reason = f"less exact than {best.way.arithmetic.value}, which fits"
    return Alternative(
        device=candidate.device,
        offload=candidate.offload,
        precision=candidate.precision,
        native=candidate.way.native,
        compiled=candidate.way.compiled,
        quality=candidate.quality,
        fits=candidate.fits,
        reason=candidate.shortfall or reason,
        seconds_per_step=candidate.timeline.step,
        seconds_per_image=candidate.seconds_per_image,
        seconds_to_start=candidate.timeline.start + backend.start_seconds,
        peak_vram_bytes=candidate.footprint.vram.peak,
        peak_ram_bytes=candidate.footprint.ram_bytes,
        pinned_bytes=candidate.pinned_bytes,
    )
