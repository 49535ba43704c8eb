"""Building a pipeline in the order in which the first pictures need it, and making a session of it."""

from __future__ import annotations

from collections.abc import Sequence

from autoflux.models.values import Model
from autoflux.planning.values import Plan
from autoflux.runtime.memory import freed_ram_given_back
from autoflux.runtime.pipeline import Backend, LoadProgress
from autoflux.runtime.prompt_cache import ENCODERS, PromptCache
from autoflux.runtime.session import Session


def open_with(
    backend: Backend, plan: Plan, model: Model, progress: LoadProgress, prompts: Sequence[str] = ()
) -> Session:
    """Load everything, text encoders first: they are what a picture needs first.

    If all `prompts`, those that are to be drawn first, were encoded before, text encoders are not read until there is
    another: see `Session.deferred`. Not every backend can do without them.

    Raises:
        As `Backend.build`.
    """
    later = _encoders(model) if _are_known(prompts, model, plan) and getattr(backend, "defers", False) else ()
    deferring = (later,) if later else ()  # what only a backend that says so takes
    with freed_ram_given_back():
        pipeline = backend.build(plan, model, progress, *deferring)
    return Session(pipeline, plan, model, deferred=bool(later))


def _encoders(model: Model) -> tuple[str, ...]:
    return tuple(component.name for component in model.components if component.name.startswith(ENCODERS))


def _are_known(prompts: Sequence[str], model: Model, plan: Plan) -> bool:
    if not prompts:
        return False
    cache = PromptCache.open(model, plan)
    return all(cache.find(prompt) is not None for prompt in dict.fromkeys(prompts))
