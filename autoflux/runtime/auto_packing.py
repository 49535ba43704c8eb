"""Which packs would spare the next start what this one has to do. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from autoflux.models.formats import QUANTIZED
from autoflux.models.pack_shelf import Shelf, packs_wanted
from autoflux.models.packs import Recipe
from autoflux.models.values import Component, Model
from autoflux.planning.terms import Placement
from autoflux.planning.values import ComponentPlan, Plan


def lacking(plan: Plan, model: Model, shelf: Shelf) -> list[Recipe]:
    """The packs of weights that loading converts, as far as they are not there; none if no packs are wanted.

    Weights that are as they will be, or only become wider, are read from the model's own files as quickly.

    Raises:
        AutofluxError: a source file cannot be read any more.
    """
    return [recipe for recipe in _converted(plan, model) if not shelf.find(recipe.key())] if packs_wanted() else []


def _converted(plan: Plan, model: Model) -> Iterator[Recipe]:
    for component in model.components:
        planned = plan.component(component.name)
        if component.files and _is_converted(component, planned):
            storage = planned.storage if planned.is_narrow else planned.arithmetic
            yield Recipe(component, storage, planned.arithmetic)


def _is_converted(component: Component, planned: ComponentPlan) -> bool:
    if planned.is_narrow:
        return planned.placement != Placement.NATIVE  # whose libraries do not know these packs
    if component.scaled or not set(component.formats).isdisjoint(QUANTIZED):
        return True
    return component.bytes_as(planned.arithmetic) < component.disk_bytes
