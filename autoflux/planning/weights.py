"""What weights take in the formats that a plan gives them. Pure arithmetic."""

from __future__ import annotations

from autoflux.models.values import Block, Component, Model, ParameterCount
from autoflux.planning.schedule import ALIGNMENT, aligned
from autoflux.planning.values import ComponentPlan

TENSORS_PER_BLOCK = 32
"""Upper bound of the tensors of a block; each begins at a multiple of the alignment. FLUX's double block has 24."""

SCALE_BYTES = 4
"""A float32 for each row of a matrix in 8 bits."""

FEWEST_COLUMNS = 1024
"""Rows of FLUX's matrices have 3072 columns at least; in small models the scales count for little."""


def component_bytes(model: Model, planned: ComponentPlan) -> int:
    """All weights of a component."""
    component = model.component(planned.name)
    blocks = sum(
        count * (_bytes(counts, planned) + _modulation(counts, planned)) for counts, count in component.alike.items()
    )
    return component.rest.parameters.total * planned.arithmetic.item_bytes + blocks


def unit_bytes(block: Block, planned: ComponentPlan) -> int:
    """What a block takes without its modulation, in memory of its own."""
    return _unit(block.parameters, planned)


def all_unit_bytes(component: Component, planned: ComponentPlan) -> list[int]:
    """The same of each block in order."""
    sizes = {counts: _unit(counts, planned) for counts in component.alike}
    return [sizes[block.parameters] for block in component.blocks]


def largest_unit(component: Component, planned: ComponentPlan) -> int:
    """The same of the largest block; 0 if there is none."""
    return max((_unit(counts, planned) for counts in component.alike), default=0)


def _unit(counts: ParameterCount, planned: ComponentPlan) -> int:
    return aligned(_bytes(counts, planned)) + TENSORS_PER_BLOCK * ALIGNMENT


def rest_bytes(block: Block, planned: ComponentPlan) -> int:
    """What lies outside the blocks takes, in memory of its own; it is never in 8 bits."""
    return aligned(block.parameters.total * planned.arithmetic.item_bytes) + TENSORS_PER_BLOCK * ALIGNMENT


def modulation_of(component: Component, planned: ComponentPlan) -> int:
    """All modulation of a component, which is never in 8 bits: a few rows that every token feels."""
    return sum(count * _modulation(counts, planned) for counts, count in component.alike.items())


def largest_modulation(component: Component, planned: ComponentPlan) -> int:
    """The modulation of the block that has most."""
    return max(_modulation(counts, planned) for counts in component.alike)


def _modulation(counts: ParameterCount, planned: ComponentPlan) -> int:
    return counts.modulation * planned.arithmetic.item_bytes


def _bytes(counts: ParameterCount, planned: ComponentPlan) -> int:
    wide = (counts.total - counts.matmul - counts.modulation) * planned.arithmetic.item_bytes
    scales = SCALE_BYTES * counts.matmul // FEWEST_COLUMNS if planned.is_narrow else 0
    return counts.matmul * planned.storage.item_bytes + wide + scales
