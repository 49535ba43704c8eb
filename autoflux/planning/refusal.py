"""Why nothing fits, and the nearest that would: whatever is suggested was planned before it is said. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, takewhile
from typing import Any, NamedTuple

from autoflux.errors import AutofluxError, DoesNotFit
from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.candidates import Candidate
from autoflux.planning.values import Picture, Wishes
from autoflux.planning.weights import component_bytes
from autoflux.units import TB, format_bytes, parse_bytes, rounded_up, size_option

FINER = 1.02
"""How far apart the ceilings are that are tried."""

MOST_BYTES = 2 * TB
"""The largest of them."""

STRIDE = 32
"""Of how many of them one is tried first; so many are nearly twice as much."""

SMALLER = 8
"""Parts of a picture's sides by which smaller ones are tried."""

_DROPPED = (
    ("--offload", {"offload": None}),
    ("--keep", {"keep": ()}),
    ("--cpu", {"cpu": ()}),
    ("--block-size", {"unit": None, "block_bytes": None}),
    ("--compile", {"compiled": None}),
    ("--graphs", {"graphs": None}),
    ("--quant", {"quant": None}),
    ("--precision", {"precision": None}),
    ("--quality", {"quality": None}),
    ("--profile", {"profile": None}),
    ("--device", {"device": None}),
)
"""Wishes that take memory, by their options, and how each is when it is not wished."""

Ways = Callable[[Wishes], Sequence[Candidate]]
"""All ways to run with other wishes, fitting or not. May raise as planning does."""


class Asked(NamedTuple):
    """What was asked for, and how to plan for something else instead."""

    wishes: Wishes
    """Memory is as `--vram` and `--ram` give it: ceilings here, and elsewhere what the machine has."""
    ways: Ways
    machine: str | None = None
    """What the other machine is called; None for this one."""


class _Rung(NamedTuple):
    """A change of the wishes: the option that makes it, or the one that it drops."""

    option: str
    wishes: dict[str, Any]
    drops: bool = False


_Ladder = Sequence[_Rung]
"""Changes of one wish, from the nearest to what was asked to the farthest."""


def refusal(hardware: Hardware, model: Model, tried: Sequence[Candidate], asked: Asked) -> DoesNotFit:
    """Need against have of the nearest way on each kind of device, and what to try."""
    by_kind = {c.kind: c for c in sorted(tried, key=lambda c: -c.missing_bytes)}
    nearest, *others = sorted(by_kind.values(), key=lambda c: c.missing_bytes)
    needs = "; ".join(f"on {c.device} with offload {c.offload.value!r}, {c.shortfall}" for c in (nearest, *others))
    parts = ", ".join(f"{c.name} {format_bytes(component_bytes(model, c))}" for c in nearest.arrangement.components)
    hint = _what_would_fit(model, nearest.picture, asked)
    if not hint:
        lifted = asked.ways(asked.wishes.replace(vram_bytes=None, ram_bytes=None))
        hint = _what_is_lacking(hardware, lifted, here=asked.machine is None)
    where = "" if asked.machine is None else f"on {asked.machine}: "
    return DoesNotFit(f"{where}{model.name!r} does not fit: {needs} (weights: {parts})", hint=hint)


def _what_would_fit(model: Model, picture: Picture, asked: Asked) -> str:
    """The least change of the wishes with which a plan was found to fit, in words; empty if there is none."""

    def fits(rungs: Iterable[_Rung]) -> bool:
        changes = {field: value for rung in rungs for field, value in rung.wishes.items()}
        try:
            return any(candidate.fits for candidate in asked.ways(asked.wishes.replace(**changes)))
        except AutofluxError:
            return False  # what is left contradicts itself, or is no size to draw

    found = (_nearest(ladders, fits) for ladders in _changes(asked.wishes, picture, model))
    return next((_words(rungs) for rungs in found if rungs), "")


def _changes(asked: Wishes, picture: Picture, model: Model) -> Iterator[tuple[_Ladder, ...]]:
    """What to change: one wish, or a ceiling and another wish at once."""
    # With the least RAM first: what less device memory would do with may take all of it.
    ceilings = [*_ceiling("--ram", "ram_bytes", asked), *_ceiling("--vram", "vram_bytes", asked)]
    others = [*_fewer(asked), *_without(asked), *_smaller(picture, model)]
    yield from ((ladder,) for ladder in (*ceilings, *others))
    if len(ceilings) == 2:
        yield tuple(ceilings)
    yield from ((ceiling, other) for other in others for ceiling in ceilings)


def _ceiling(option: str, field: str, asked: Wishes) -> Iterator[_Ladder]:
    """More and more memory, and at last all there is."""
    had = getattr(asked, field)
    if had is not None:
        options = takewhile(
            lambda size: parse_bytes(size) < MOST_BYTES, (size_option(had * FINER**times) for times in count(1))
        )
        rungs = [_Rung(f"{option} {size}", {field: parse_bytes(size)}) for size in options]
        yield [*rungs, _Rung(option, {field: None}, drops=True)]


def _fewer(asked: Wishes) -> Iterator[_Ladder]:
    if asked.batch is not None and asked.batch > 1:
        yield [_Rung(f"--batch {batch}", {"batch": batch}) for batch in range(asked.batch - 1, 0, -1)]


def _without(asked: Wishes) -> Iterator[_Ladder]:
    for option, unwished in _DROPPED:
        if asked.replace(**unwished) != asked:
            denied = any(getattr(asked, field) is False for field in unwished)
            yield [_Rung(option.replace("--", "--no-") if denied else option, unwished, drops=True)]


def _smaller(picture: Picture, model: Model) -> Iterator[_Ladder]:
    step = model.limits.size_multiple
    sides = [
        tuple(side * part // SMALLER // step * step for side in (picture.width, picture.height))
        for part in range(SMALLER - 1, 0, -1)
    ]
    rungs = [
        _Rung(f"--size {width}x{height}", {"width": width, "height": height})
        for width, height in sides
        if min(width, height) >= model.limits.min_side
    ]
    if rungs:
        yield rungs


def _nearest(ladders: Sequence[_Ladder], fits: Callable[[Iterable[_Rung]], bool]) -> list[_Rung]:
    """Of each ladder the first rung with which all fit together; none if not even the last ones do."""
    taken = [ladder[-1] for ladder in ladders]
    if not fits(taken):
        return []
    for place, ladder in enumerate(ladders):
        before, after = taken[:place], taken[place + 1 :]
        taken[place] = _first(ladder, lambda rung: fits([*before, rung, *after]))  # noqa: B023 — called at once
    return taken


def _first(ladder: _Ladder, fits: Callable[[_Rung], bool]) -> _Rung:
    """The first rung that fits, as all after it do. From the near end, where plans take less time to make."""
    last = len(ladder) - 1
    high = next((place for place in range(STRIDE, last, STRIDE) if fits(ladder[place])), last)
    low = max(0, high - 1) // STRIDE * STRIDE
    return ladder[bisect_left(ladder, True, low, high, key=fits)]  # noqa: FBT003 — what is looked for


def _words(rungs: Iterable[_Rung]) -> str:
    made = " and ".join(rung.option for rung in rungs if not rung.drops)
    dropped = " and ".join(rung.option for rung in rungs if rung.drops)
    if not made:
        return f"without {dropped} it would fit"
    return f"{made} without {dropped} would fit" if dropped else f"{made} would fit"


def _what_is_lacking(hardware: Hardware, lifted: Sequence[Candidate], *, here: bool) -> str:
    """How much of which memory, beyond all that the machine may use, the nearest of the ways without ceilings takes."""
    nearest = min(lifted, key=lambda c: c.missing_bytes)
    site, host = nearest.site, hardware.host
    available = site.ram_limit_bytes + site.profile.priors.ram_reserve_bytes
    unpinned = (nearest.pinned_bytes - nearest.pinnable_bytes) * available / max(1, nearest.pinnable_bytes)
    ram = rounded_up(max(0, nearest.footprint.ram_bytes - site.ram_limit_bytes, unpinned))
    vram = rounded_up(max(0, nearest.missing_vram_bytes))
    lacks = " and ".join(f"{format_bytes(n)} more {kind}" for n, kind in ((vram, "device memory"), (ram, "RAM")) if n)
    card = site.accelerator
    taken = 0 if card is None else card.total_bytes.value - card.usable_bytes.value
    if here and vram <= taken and ram <= host.total_bytes.value - host.available_bytes.value:
        return f"free {lacks}"
    return f"a machine with {lacks}"
