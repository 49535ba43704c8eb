"""Which packs would spare the next start what this one has to do. Does not import torch."""

from __future__ import annotations

from autoflux.models.formats import QUANTIZED
from autoflux.models.pack_shelf import Shelf, packs_wanted
from autoflux.models.packs import Recipe
from autoflux.models.values import Model
from autoflux.planning.packs import recipe_for
from autoflux.planning.values import Plan


def used(plan: Plan, model: Model) -> list[Recipe]:
    """The packs that loading takes weights from where they are there."""
    made = (recipe_for(component, plan.component(component.name)) for component in model.components)
    return [recipe for recipe in made if recipe and recipe.component.files]


def lacking(plan: Plan, model: Model, shelf: Shelf) -> list[Recipe]:
    """The packs of weights that loading converts, as far as they are not there; none if no packs are wanted.

    Weights that are as they will be, or only become wider, are read from the model's own files as quickly.

    Raises:
        AutofluxError: a source file cannot be read any more.
    """
    if not packs_wanted():
        return []
    return [recipe for recipe in used(plan, model) if _is_converted(recipe) and not shelf.find(recipe.key())]


def _is_converted(recipe: Recipe) -> bool:
    component = recipe.component
    if recipe.narrow or component.scaled or not set(component.formats).isdisjoint(QUANTIZED):
        return True
    return component.bytes_as(recipe.arithmetic) < component.disk_bytes
