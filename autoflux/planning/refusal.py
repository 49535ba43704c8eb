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

Ways = Callable[[Wishes], Iterable[Candidate]]
"""All ways to run with other wishes, fitting or not, judged one by one. May raise as planning does."""


class Asked(NamedTuple):
    """What was asked for, and how to plan for something else instead."""

    wishes: Wishes
    """Memory is as `--vram` and `--ram` give it: ceilings here, and elsewhere what the machine has."""
    ways: Ways
    hardware: Hardware
    """The machine as it is, before `--vram` and `--ram` change another one."""
    machine: str | None = None
    """What the other machine is called; None for this one."""


class _Rung(NamedTuple):
    """A change of the wishes: the option that makes it, or the one that it drops."""

    option: str
    wishes: dict[str, Any]
    drops: bool = False
    size: int = 0
    """Bytes of a ceiling."""


_Ladder = Sequence[_Rung]
"""Changes of one wish, from the nearest to what was asked to the farthest."""

_Nearest = Callable[..., Candidate | None]
"""The first way that fits with these rungs, like that one if one is given; else the one that lacks least, or None."""


def refusal(hardware: Hardware, model: Model, tried: Sequence[Candidate], asked: Asked) -> DoesNotFit:
    """Need against have of the nearest way on each kind of device, and what to try."""
    by_kind = {c.kind: c for c in sorted(tried, key=lambda c: -c.missing_bytes)}
    nearest, *others = sorted(by_kind.values(), key=lambda c: c.missing_bytes)
    needs = "; ".join(f"on {c.device} with offload {c.offload.value!r}, {c.shortfall}" for c in (nearest, *others))
    parts = ", ".join(f"{c.name} {format_bytes(component_bytes(model, c))}" for c in nearest.arrangement.components)
    hint = _what_would_fit(model, nearest, asked) or _what_is_lacking(hardware, asked)
    where = "" if asked.machine is None else f"on {asked.machine}: "
    return DoesNotFit(f"{where}{model.name!r} does not fit: {needs} (weights: {parts})", hint=hint)


def _what_would_fit(model: Model, tried: Candidate, asked: Asked) -> str:
    """The least change of the wishes with which a plan was found to fit, in words; empty if there is none.

    `tried` is the nearest of what was asked.
    """
    known: dict[Wishes, Candidate | None] = {asked.wishes: tried}

    def nearest(rungs: Iterable[_Rung], like: Candidate | None = None) -> Candidate | None:
        wishes = asked.wishes.replace(**{field: value for rung in rungs for field, value in rung.wishes.items()})
        if wishes in known:
            return known[wishes]
        try:
            found = _first_or_nearest(asked.ways(_narrowed(wishes, like) if like else wishes))
        except AutofluxError:
            found = None  # what is left contradicts itself, or is no size to draw
        if like is None:
            known[wishes] = found
        return found

    found = (_nearest(ladders, nearest) for ladders in _changes(asked, tried.picture, model))
    return next((_words(rungs) for rungs in found if rungs), "")


def _first_or_nearest(ways: Iterable[Candidate]) -> Candidate:
    """The first that fits, after which none is judged; if none does, the one that lacks least."""
    tried: list[Candidate] = []
    for candidate in ways:
        if candidate.fits:
            return candidate
        tried.append(candidate)
    return min(tried, key=lambda c: c.missing_bytes)


def _narrowed(wishes: Wishes, like: Candidate) -> Wishes:
    """With no other way left to compute than that one's."""
    way = like.way
    return wishes.replace(
        device=like.device,
        offload=like.offload,
        precision=way.arithmetic,
        quant=way.storage,
        compiled=way.compiled,
        graphs=way.graphs,
    )


def _changes(asked: Asked, picture: Picture, model: Model) -> Iterator[tuple[_Ladder, ...]]:
    """What to change: one wish, or a ceiling and another wish at once, or at last both ceilings and another."""
    wishes = asked.wishes
    # With the least RAM first: what less device memory would do with may take all of it.
    ceilings = [*_ceiling("--ram", "ram_bytes", asked), *_ceiling("--vram", "vram_bytes", asked)]
    others = [*_fewer(wishes), *_without(wishes), *_smaller(picture, model)]
    yield from ((ladder,) for ladder in (*ceilings, *others))
    if len(ceilings) == 2:
        yield tuple(ceilings)
    yield from ((ceiling, other) for other in others for ceiling in ceilings)
    if len(ceilings) == 2:
        lifted = [ceiling[-1] for ceiling in ceilings]
        yield from ((*([rung] for rung in lifted), other) for other in others)


def _ceiling(option: str, field: str, asked: Asked) -> Iterator[_Ladder]:
    """What there is now, more and more memory, and at last all there is: of another machine it may be any."""
    had = getattr(asked.wishes, field)
    if had is not None:
        options = takewhile(
            lambda size: parse_bytes(size) < MOST_BYTES, (size_option(had * FINER**times) for times in count(1))
        )
        rungs = [_Rung(f"{option} {size}", {field: parse_bytes(size)}, size=parse_bytes(size)) for size in options]
        now = _Rung(f"{option} {size_option(had)}", {field: had}, size=had)
        all_of_it = [_Rung(option, {field: None}, drops=True)] if asked.machine is None else []
        yield [now, *rungs, *all_of_it]


def _fewer(asked: Wishes) -> Iterator[_Ladder]:
    if asked.batch is not None and asked.batch > 1:
        yield [_Rung(f"--batch {batch}", {"batch": batch}) for batch in range(asked.batch - 1, 0, -1)]


def _without(asked: Wishes) -> Iterator[_Ladder]:
    for option, unwished in _DROPPED:
        for field in unwished.keys() & {"keep", "cpu"}:
            named = getattr(asked, field)
            for name in named if len(named) > 1 else ():
                others = tuple(other for other in named if other != name)
                yield [_Rung(f"{option} {name}", {field: others}, drops=True)]
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


def _nearest(ladders: Sequence[_Ladder], nearest: _Nearest) -> list[_Rung]:
    """Of each ladder the first rung with which all fit together; none if not even the last ones do."""
    taken = [ladder[-1] for ladder in ladders]
    if not _fits(nearest(taken)):
        return []
    for place, ladder in enumerate(ladders):
        before, after = taken[:place], taken[place + 1 :]
        taken[place] = _first(ladder, lambda rung, like: nearest([*before, rung, *after], like))  # noqa: B023 — called at once
    return taken if _fits(nearest(taken)) else []


def _first(ladder: _Ladder, nearest: Callable[[_Rung, Candidate | None], Candidate | None]) -> _Rung:
    """The first rung that fits, if all after it do, as the last does.

    What is returned always fits, but need not be the very first that does: more memory may do less once, and of
    ceilings only the way is tried further that lacked least of the lowest. They are raised by what is lacking, or in
    ever longer strides where that is of other memory; other ladders are halved.
    """
    low, high, place, like = -1, len(ladder) - 1, 0, None
    up = back = 1 if ladder[0].size else high
    while high - low > 1:
        place = (low + high) // 2 if 2 * max(up, back) > high - low else min(max(place, low + 1), high - 1)
        found = nearest(ladder[place], like)
        if _fits(found):
            high, place, back = place, place - back, 2 * back
            continue
        low, enough = place, 0
        if found and ladder[low].size:
            like, needed = found, ladder[low].size + found.missing_bytes
            enough = bisect_left(ladder, needed, low, high, key=lambda rung: rung.size)
        place, up = max(enough, low + up), up if enough > low + up else 2 * up
    return ladder[high]


def _fits(candidate: Candidate | None) -> bool:
    return candidate is not None and candidate.fits


def _words(rungs: Iterable[_Rung]) -> str:
    made = " and ".join(rung.option for rung in rungs if not rung.drops)
    dropped = " and ".join(rung.option for rung in rungs if rung.drops)
    if not made:
        return f"without {dropped} it would fit"
    return f"{made} without {dropped} would fit" if dropped else f"{made} would fit"


def _what_is_lacking(hardware: Hardware, asked: Asked) -> str:
    """How much of which memory, beyond all that the machine asked for may use, the nearest way without ceilings takes.

    It is counted on the machine as it is: of one asked for with less memory than its system takes nothing can be told.
    """
    lifted = asked.ways(asked.wishes.replace(vram_bytes=None, ram_bytes=None))
    nearest = min(lifted, key=lambda c: c.missing_bytes)
    site, host, there = nearest.site, hardware.host, asked.hardware.host
    available = site.ram_limit_bytes + site.profile.priors.ram_reserve_bytes
    unpinned = (nearest.pinned_bytes - nearest.pinnable_bytes) * available / max(1, nearest.pinnable_bytes)
    less_ram = there.total_bytes.value - host.total_bytes.value
    ram = rounded_up(max(0, less_ram + max(nearest.footprint.ram_bytes - site.ram_limit_bytes, unpinned)))
    card = site.accelerator
    had = card and hardware.accelerator(card.kind, card.index)
    less_vram = card.total_bytes.value - had.total_bytes.value if card and had else 0
    vram = rounded_up(max(0, less_vram + nearest.missing_vram_bytes))
    if card and card.unified_memory:  # which is lent a share of the RAM
        ram, vram = max(ram, rounded_up(vram * there.total_bytes.value // card.total_bytes.value)), 0
    lacks = " and ".join(f"{format_bytes(n)} more {kind}" for n, kind in ((vram, "device memory"), (ram, "RAM")) if n)
    taken = 0 if card is None else card.total_bytes.value - card.usable_bytes.value
    if asked.machine is None and vram <= taken and ram <= host.total_bytes.value - host.available_bytes.value:
        return f"free {lacks}"
    return f"a machine with {lacks}"
