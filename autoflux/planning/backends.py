"""Choosing the library that builds the pipeline, by what is predicted of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autoflux.errors import UnknownName, UnsupportedModel
from autoflux.planning.terms import Offload
from autoflux.planning.values import Wishes
from autoflux.units import format_seconds
from autoflux.values import Value


class BackendFacts(Value, frozen=True, kw_only=True):
    """What a backend says of itself for one model, beyond its name."""

    name: str
    refuses: str = ""
    """Why it cannot run the model; "" if it can."""
    start_seconds: float = 0.0
    """What it takes to start beyond a profile's `start_seconds`."""


class ChosenBackend(NamedTuple):
    """A backend, why it was taken, and what it takes to start beyond the others' common part."""

    name: str
    reason: str
    start_seconds: float


def choose_backend(
    wishes: Wishes, backends: Sequence[str], facts: Sequence[BackendFacts], *, tuned: str | None = None
) -> ChosenBackend:
    """The `tuned` backend, or else the one with the quickest start among those that can run the model.

    Of equals the first. Steps decide nothing: every backend runs the same plan on the same engine. With a library's
    own offload, which is only wished for, they differ, and nothing predicts by how much.

    Raises:
        UnknownName: there is none, or none of the wished name.
        UnsupportedModel: none can run the model.
    """
    known = {name: BackendFacts(name=name) for name in backends} | {f.name: f for f in facts if f.name in backends}
    if wishes.backend is not None:
        if wishes.backend not in known:
            raise UnknownName("backend", wishes.backend, backends)
        return ChosenBackend(wishes.backend, "you asked for it", known[wishes.backend].start_seconds)
    if not known:
        raise UnknownName("backend", "any", (), hint="pip install diffusers")
    able = [backend for backend in known.values() if not backend.refuses]
    if not able:
        first = known[backends[0]]
        raise UnsupportedModel(f"no backend can run this model; {first.name!r}: {first.refuses}")
    if tuned in [backend.name for backend in able]:
        return ChosenBackend(known[tuned].name, "the fastest when plans were run", known[tuned].start_seconds)
    chosen = min(able, key=lambda backend: backend.start_seconds)
    others = [backend for backend in known.values() if backend is not chosen]
    return ChosenBackend(chosen.name, _reason(chosen, others, wishes), chosen.start_seconds)


def _reason(chosen: BackendFacts, others: Sequence[BackendFacts], wishes: Wishes) -> str:
    if not others:
        return "the only one that is installed"
    against = "; ".join(_against(chosen, other) for other in others)
    if any(not other.refuses for other in others) and wishes.offload != Offload.NATIVE:
        return f"{against}; a step takes as long with each, as they share the engine"
    return against


def _against(chosen: BackendFacts, other: BackendFacts) -> str:
    if other.refuses:
        return f"{other.name} cannot: {other.refuses}"
    later = other.start_seconds - chosen.start_seconds
    if later > 0:
        return f"{other.name} starts {format_seconds(later)} later"
    return f"{other.name} starts as quickly and comes after it"
