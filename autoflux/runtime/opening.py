"""Building a pipeline in the order in which the first pictures need it, and making a session of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from autoflux.files import is_there
from autoflux.models.pack_shelf import Shelf, packs_wanted
from autoflux.models.packs import WEIGHTS
from autoflux.models.values import Model
from autoflux.planning.packs import recipe_for
from autoflux.planning.values import Plan
from autoflux.runtime.cache_filling import Filling, read_ahead
from autoflux.runtime.memory import collection_paused, freed_ram_given_back
from autoflux.runtime.pipeline import Backend, LoadProgress
from autoflux.runtime.prompt_cache import ENCODERS, PromptCache
from autoflux.runtime.session import Session


def open_with(
    backend: Backend, plan: Plan, model: Model, progress: LoadProgress, prompts: Sequence[str] = ()
) -> Session:
    """Load everything, text encoders first: they are what a picture needs first.

    If all `prompts`, those that are to be drawn first, were encoded before, text encoders are not read until there is
    another: see `Session.deferred`. Not every backend can do without them.

    Before a backend begins with the first weights it imports libraries, which takes as long as the disk needs for some
    GB. Meanwhile those of packs come to a card (see `ahead`), or what will be read comes into the page cache.

    Raises:
        As `Backend.build`.
    """
    cache = PromptCache.open(model, plan)
    defers = bool(prompts) and getattr(backend, "defers", False)
    # Told without torch, which takes long to import; what is there may yet be damaged.
    unread = _encoders(model) if defers and all(map(cache.knows, prompts)) else ()
    ahead = read_ahead(list(_files(plan, model, unread)))

    def begun(stage: str, share: float) -> None:
        ahead.stop()
        progress(stage, share)

    later = unread if unread and all(cache.find(prompt) is not None for prompt in dict.fromkeys(prompts)) else ()
    deferring = (later,) if later else ()  # what only a backend that says so takes
    try:
        as_packed = getattr(backend, "as_packed", False)
        with freed_ram_given_back(), _weights_coming(plan, model, unread, ahead, as_packed=as_packed):
            pipeline = backend.build(plan, model, begun, *deferring)
    finally:
        ahead.stop()
    return Session(pipeline, plan, model, deferred=bool(later))


@contextmanager
def _weights_coming(
    plan: Plan, model: Model, unread: Collection[str], meanwhile: Filling, *, as_packed: bool
) -> Iterator[None]:
    """What comes to a card while libraries are imported; `meanwhile` ends once that is under way."""
    if not (plan.device.startswith("cuda") and packs_wanted()):
        yield
        return
    with collection_paused():
        from autoflux.runtime.ahead import bringing_ahead  # noqa: PLC0415 — imports torch
    with bringing_ahead(plan, model, unread, as_packed=as_packed) as begun:
        if begun:
            meanwhile.stop()
        yield


def _files(plan: Plan, model: Model, unread: Collection[str]) -> Iterator[Path]:
    """What is read, in order: packs where there are, and the model's own files."""
    shelf = Shelf()
    for component in model.in_loading_order:
        if component.name in unread:
            continue
        recipe = recipe_for(component, plan.component(component.name)) if packs_wanted() else None
        pack = shelf.folder(recipe.key()) / WEIGHTS if recipe else None
        yield from [pack] if pack and is_there(pack) else map(Path, component.files)


def _encoders(model: Model) -> tuple[str, ...]:
    return tuple(component.name for component in model.components if component.name.startswith(ENCODERS))
