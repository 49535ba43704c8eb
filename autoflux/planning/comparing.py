"""All ways to run beside each other: the best of every device, strategy, precision and quality. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from autoflux.errors import ContradictoryWishes
from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.candidates import Candidate, candidates
from autoflux.planning.findings import NO_FINDINGS, Findings
from autoflux.planning.terms import DEFAULT_ATTENTION, Quality
from autoflux.planning.values import Alternative, Picture, Plan, Profile, Wishes

Kind = tuple[str, str, str, str]
"""Device, strategy, precision of the transformer's weights, and quality."""


def best_of_each_kind(
    hardware: Hardware,
    model: Model,
    profiles: Sequence[Profile],
    wishes: Wishes,
    picture: Picture,
    findings: Findings = NO_FINDINGS,
) -> list[Candidate]:
    """Of every kind that the wishes leave open the fastest that fits, or what lacks least; the best first.

    Raises as `candidates`.
    """
    best: dict[Kind, Candidate] = {}
    for candidate in _every(hardware, model, profiles, wishes, picture, findings):
        other = best.setdefault(kind(candidate), candidate)
        if _rank(candidate) < _rank(other):
            best[kind(candidate)] = candidate
    return sorted(best.values(), key=_rank)


def kind(candidate: Candidate) -> Kind:
    """What is compared."""
    return candidate.device, candidate.offload, candidate.precision, candidate.quality


def as_alternative(plan: Plan) -> Alternative:
    """The plan itself, as a row among its alternatives."""
    transformer, told = plan.component("transformer"), plan.predicted
    tiled = plan.tile_decode and plan.quality != Quality.EXACT
    changes = transformer.is_narrow or plan.compiled or plan.attention != DEFAULT_ATTENTION or tiled
    return Alternative(
        device=plan.device,
        offload=plan.offload,
        precision=transformer.storage,
        native=transformer.native,
        compiled=plan.compiled,
        quality=Quality.BALANCED if changes else Quality.EXACT,
        fits=True,
        reason="",
        seconds_per_step=told.seconds_per_step,
        seconds_per_image=told.seconds_per_image,
        seconds_to_start=told.seconds_to_start,
        peak_vram_bytes=told.peak_vram_bytes.peak,
        peak_ram_bytes=told.peak_ram_bytes,
        pinned_bytes=told.pinned_bytes,
    )


def _every(
    hardware: Hardware,
    model: Model,
    profiles: Sequence[Profile],
    wishes: Wishes,
    picture: Picture,
    findings: Findings = NO_FINDINGS,
) -> list[Candidate]:
    """As exactly as can be, too, where the user did not say how exact."""
    found = list(candidates(hardware, model, profiles, wishes, picture, findings, every=True))
    if wishes.quality is not None:
        return found
    exactly = wishes.replace(quality=Quality.EXACT)
    try:
        return [*found, *candidates(hardware, model, profiles, exactly, picture, findings, every=True)]
    except ContradictoryWishes:
        return found  # another wish leaves nothing exact


def _rank(candidate: Candidate) -> tuple[float, ...]:
    return max(0, candidate.missing_bytes), *candidate.cost
