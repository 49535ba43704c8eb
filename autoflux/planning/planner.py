"""Choosing the way to run: every candidate is measured by footprint and timeline, the fastest that fits is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from autoflux.hardware.values import DeviceKind, Figure, Hardware
from autoflux.models.request import Request, check
from autoflux.models.values import Model
from autoflux.planning.backends import ChosenBackend, choose_backend
from autoflux.planning.calibration import NEARLY, Calibration, Setting
from autoflux.planning.candidates import HOST_AHEAD, Candidate, candidates
from autoflux.planning.comparing import best_of_each_kind, kind
from autoflux.planning.explaining import explained
from autoflux.planning.findings import NO_FINDINGS, Findings
from autoflux.planning.reasons import choices, rejection
from autoflux.planning.refusal import Asked, refusal
from autoflux.planning.speed import FROM_PROFILE, block_seconds
from autoflux.planning.streaming import hoists, streamed_bytes
from autoflux.planning.terms import Quality, Waiting
from autoflux.planning.timeline import copy_gb_per_s
from autoflux.planning.values import Alternative, Calibrated, Correction, Picture, Plan, Predicted, Profile, Wishes

WORTH_TRYING = 2.0
"""How much longer than the best a picture may be predicted to take for a plan to be run at all: predictions that never
met a run have been up to that wrong."""


class Detail(NamedTuple):
    """What a plan says beside what is to be done."""

    explain: bool = False
    """The next best to each choice."""
    compare: bool = False
    """The best of every device, strategy, precision and quality among what was rejected."""


BRIEF = Detail()


def make_plan(
    hardware: Hardware,
    model: Model,
    profiles: Sequence[Profile],
    wishes: Wishes,
    backends: Sequence[str],
    findings: Findings = NO_FINDINGS,
    *,
    detail: Detail = BRIEF,
    asked: Asked | None = None,
) -> Plan:
    """The fastest way to run `model` on `hardware` that keeps to the `wishes`; of equals, the smaller.

    `backends` are the names that work here, the preferred one first. Predictions are corrected by what runs took
    (`findings`), and the setting that `tune` chose is followed where it is nearly the fastest. `detail` is what to work
    out beside, which takes longer than the plan. `asked` is for another machine: how to plan for it again if nothing
    fits.

    Raises:
        DoesNotFit: no way fits; the message gives need against have, the hint what would fit, or what is lacking.
        DeviceUnavailable: the wished device is not there.
        ContradictoryWishes: two wishes exclude each other.
        UnknownName: no backend, profile or component of that name.
        InvalidRequest: the wished size or steps are out of the model's limits.
        UnsupportedModel: no backend can run the model.
    """
    picture = _picture(model, wishes)
    backend = choose_backend(wishes, backends, findings.facts, tuned=findings.tuned_backend)
    known = findings.of_backend(backend.name)
    tried = list(candidates(hardware, model, profiles, wishes, picture, known))
    fitting = _preferred([c for c in tried if c.fits])
    if not fitting:
        asked = asked or Asked(wishes, partial(ways, hardware, model, profiles, findings=known), hardware)
        raise refusal(hardware, model, tried, asked)
    best = _best(fitting, backend.name, known.calibration)
    others = [c for c in tried if c is not best]
    plan = _plan(hardware, model, wishes, backend, best, others)
    if detail.explain:
        plan = plan.replace(choices=explained(hardware, model, wishes, best, others, plan.choices, backend))
    if detail.compare:
        kinds = best_of_each_kind(hardware, model, profiles, wishes, picture, known)
        plan = plan.replace(rejected=tuple(rejection(c, best, backend) for c in kinds if kind(c) != kind(best)))
    return plan


def ways(
    hardware: Hardware, model: Model, profiles: Sequence[Profile], wishes: Wishes, findings: Findings = NO_FINDINGS
) -> Iterator[Candidate]:
    """All ways that the wishes leave open, fitting or not, one by one. Raises as `make_plan`, but DoesNotFit."""
    return candidates(hardware, model, profiles, wishes, _picture(model, wishes), findings)


def all_ways(
    hardware: Hardware, model: Model, profiles: Sequence[Profile], wishes: Wishes, findings: Findings = NO_FINDINGS
) -> tuple[Alternative, ...]:
    """The best of every device, strategy, precision and quality, also where nothing fits. Raises as `make_plan`."""
    kinds = best_of_each_kind(hardware, model, profiles, wishes, _picture(model, wishes), findings)
    none = ChosenBackend("", "nothing is built", 0.0)
    return tuple(rejection(candidate, kinds[0], none) for candidate in kinds)


def make_plans(
    hardware: Hardware,
    model: Model,
    profiles: Sequence[Profile],
    wishes: Wishes,
    backends: Sequence[str],
    findings: Findings = NO_FINDINGS,
    *,
    count: int,
) -> list[Plan]:
    """The plans that are worth running to find out which is the fastest, at most `count`, each of another setting.

    First the plan that `make_plan` makes, then the best of each further backend, which gets no more: most of what tells
    two backends apart is the same for all their plans. Then others by predicted time.

    Raises:
        As `make_plan`.
    """
    backend = choose_backend(wishes, backends, findings.facts, tuned=findings.tuned_backend)
    made = [make_plan(hardware, model, profiles, wishes, backends, findings)]
    if wishes.backend is None:
        unable = {fact.name for fact in findings.facts if fact.refuses}
        further = [name for name in backends if name != backend.name and name not in unable]
        made += [make_plan(hardware, model, profiles, wishes, [name], findings) for name in further]
    known = findings.of_backend(backend.name)
    picture = made[0].predicted.picture
    tried = list(candidates(hardware, model, profiles, wishes, picture, known, every=True))
    fitting = sorted(_preferred([c for c in tried if c.fits]), key=lambda c: c.cost)
    worth = [c for c in fitting if c.seconds_per_image <= WORTH_TRYING * fitting[0].seconds_per_image]
    made += [_plan(hardware, model, wishes, backend, chosen, [c for c in tried if c is not chosen]) for chosen in worth]
    return _distinct(made)[:count]


def _distinct(plans: Sequence[Plan]) -> list[Plan]:
    """Of each setting the first."""
    seen: dict[Setting, Plan] = {}
    for plan in plans:
        seen.setdefault(Setting.of(plan), plan)
    return list(seen.values())


def _best(fitting: Sequence[Candidate], backend: str, calibration: Calibration | None) -> Candidate:
    """The fastest; but the tuned one if it is nearly as fast, and none that turned out slower than one that fits."""
    if calibration is None:
        return _fastest(fitting)
    settings = {candidate.setting(backend): candidate for candidate in fitting}
    slower = {s.setting for s in calibration.slower if s.than != s.setting and s.than in settings}
    left = {setting: c for setting, c in settings.items() if setting not in slower} or settings
    best = _fastest(left.values())
    tuned = left.get(calibration.tuned.setting) if calibration.tuned else None
    return tuned if tuned and tuned.cost[0] <= NEARLY * best.cost[0] else best


def _fastest(fitting: Collection[Candidate]) -> Candidate:
    """The least cost; on the processor only if it is far ahead of every accelerator."""
    cards = [c for c in fitting if c.kind != DeviceKind.CPU]
    fastest = min(fitting, key=lambda c: c.cost)
    if not cards or fastest in cards:
        return fastest
    card = min(cards, key=lambda c: c.cost)
    return fastest if card.seconds_per_image > HOST_AHEAD * fastest.seconds_per_image else card


def _preferred(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Of each device only the best arithmetic that fits: a worse one is for want of memory, not for speed."""
    best = {c.device: min(o.preference for o in fitting if o.device == c.device) for c in fitting}
    return [c for c in fitting if c.preference == best[c.device]]


def _picture(model: Model, wishes: Wishes) -> Picture:
    defaults = model.defaults
    picture = Picture(
        width=defaults.width if wishes.width is None else wishes.width,
        height=defaults.height if wishes.height is None else wishes.height,
        steps=defaults.steps if wishes.steps is None else wishes.steps,
        text_tokens=defaults.text_tokens,
        batch=wishes.batch or 1,
    )
    request = Request(
        prompt="a picture", seed=0, steps=picture.steps, guidance=0, width=picture.width, height=picture.height
    )
    check(request, model.limits)
    return picture


def _plan(
    hardware: Hardware,
    model: Model,
    wishes: Wishes,
    backend: ChosenBackend,
    best: Candidate,
    others: Sequence[Candidate],
) -> Plan:
    held = best.arrangement
    priors, waiting = best.profile.priors, held.component("transformer").waiting
    predicted = Predicted(
        picture=best.picture,
        block_seconds=block_seconds(model, best.rates, priors, best.picture, best.way),
        copy_gb_per_s=copy_gb_per_s(waiting, best.rates) if held.streamed else 0.0,
        streamed_bytes=streamed_bytes(model, held),
        seconds_per_step=best.timeline.step,
        seconds_per_image=best.seconds_per_image,
        seconds_to_start=best.timeline.start + backend.start_seconds,
        peak_vram_bytes=best.footprint.vram,
        peak_ram_bytes=best.footprint.ram_bytes,
        pinned_bytes=best.pinned_bytes,
    )
    return Plan(
        model=model.name,
        model_path=model.path,
        model_revision=model.revision,
        fingerprint=hardware.fingerprint,
        profile=best.profile.name,
        priors=priors,
        backend=backend.name,
        device=best.device,
        unified_memory=best.site.accelerator is not None and best.site.one_memory,
        offload=best.offload,
        components=held.components,
        ring_bytes=held.ring_bytes,
        hoist_modulation=hoists(held),
        keep_modulation=held.keep_modulation,
        tile_decode=held.tile_decode,
        park_for_decode=held.park_for_decode,
        unit=held.unit,
        block_bytes=held.block_bytes,
        compiled=best.way.compiled,
        graphs=best.way.graphs,
        attention=best.rates.attention,
        quality=wishes.quality or Quality.BALANCED,
        max_batch=best.max_batch,
        vram_limit_bytes=best.site.vram_limit_bytes,
        ram_limit_bytes=best.site.ram_limit_bytes,
        predicted=predicted,
        calibrated=_calibrated(best),
        choices=choices(hardware, model, wishes, backend, best, others),
        rejected=tuple(rejection(c, best, backend) for c in others),
        warnings=_warnings(model, best, wishes),
    )


def _calibrated(best: Candidate) -> Calibrated | None:
    known = best.site.calibration
    if known is None or best.rates.correction == Correction():
        return None
    return Calibrated(made_at=known.made_at, steps=known.steps, correction=best.rates.correction)


def _warnings(model: Model, best: Candidate, wishes: Wishes) -> tuple[str, ...]:
    figures = {"arithmetic rate": best.rates.matmul_tflops, "disk rate": best.rates.disk_gb_per_s}
    if not best.site.one_memory:
        figures["link bandwidth"] = best.rates.link_gb_per_s
    return (*_told(figures, best, wishes), *_seams(best, wishes), *_worth_packing(model, best, wishes))


def _seams(best: Candidate, wishes: Wishes) -> Iterator[str]:
    if wishes.quality == Quality.EXACT and best.arrangement.tile_decode:
        yield "pictures are decoded in tiles, as a whole one does not fit: all but faint seams is exact"


def _worth_packing(model: Model, best: Candidate, wishes: Wishes) -> Iterator[str]:
    """Where wide weights are read from the disk in each step because there are no others."""
    narrow = best.profile.eight_bit
    if not best.arrangement.streamed or best.way.is_narrow or not narrow:
        return
    waits = best.arrangement.component("transformer").waiting == Waiting.DISK
    if waits and wishes.quality != Quality.EXACT and wishes.quant is None:
        yield (
            "the transformer's weights are read from the disk in each step, and packed in 8 bits they would be half as "
            f"many bytes: `autoflux models pack {model.path or model.name} --precision {narrow[0].value}`, once"
        )


def _told(figures: dict[str, Figure], best: Candidate, wishes: Wishes) -> Iterator[str]:
    unmeasured = [name for name, figure in figures.items() if figure.note == FROM_PROFILE]
    if unmeasured:
        yield f"{', '.join(unmeasured)} not measured; assumed from the profile {best.profile.name!r}"
    if wishes.vram_bytes is not None and best.site.vram_limit_bytes is None:
        yield "the ceiling of device memory (--vram) means nothing on the CPU; --ram limits its memory"
