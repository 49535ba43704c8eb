"""What is packed on the machine that a plan is for, as the planner is told it, and what that spares."""

from __future__ import annotations

from autoflux.models.packs import Recipe
from autoflux.models.values import Component, Model, Precision
from autoflux.planning.terms import Placement
from autoflux.planning.values import Arrangement, ComponentPlan
from autoflux.values import Value


class PackedPart(Value, frozen=True, kw_only=True):
    """A component whose weights are packed: the matrices of its blocks in `storage`, all others in `arithmetic`."""

    component: str
    storage: Precision
    arithmetic: Precision
    nbytes: int


class Packs(Value, frozen=True, kw_only=True):
    """All packs of a model."""

    parts: tuple[PackedPart, ...] = ()

    def find(self, component: str, storage: Precision, arithmetic: Precision) -> PackedPart | None:
        """The pack of a component in these formats."""
        wanted = (component, storage, arithmetic)
        return next((p for p in self.parts if (p.component, p.storage, p.arithmetic) == wanted), None)

    def used_for(self, planned: ComponentPlan) -> PackedPart | None:
        """The pack that loading takes a component from; None if it reads the model's own files."""
        storage = _packed_storage(planned)
        return self.find(planned.name, storage, planned.arithmetic) if storage else None


NO_PACKS = Packs()


def recipe_for(component: Component, planned: ComponentPlan) -> Recipe | None:
    """Of the pack that a component is loaded from if there is one; None if it is read from its files in any case."""
    storage = _packed_storage(planned)
    return Recipe(component, storage, planned.arithmetic) if storage else None


def _packed_storage(planned: ComponentPlan) -> Precision | None:
    if planned.is_narrow and planned.placement == Placement.NATIVE:
        return None  # the backend's own offload does not know layers in 8 bits
    return planned.storage if planned.is_narrow else planned.arithmetic


def read_bytes(model: Model, arrangement: Arrangement) -> int:
    """What is read from the disk until everything is loaded."""
    return sum(planned.packed_bytes or model.component(planned.name).disk_bytes for planned in arrangement.components)
