"""What weights take in the formats that a plan gives them. Pure arithmetic."""

from __future__ import annotations

from autoflux.models.values import Block, Model
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
    blocks = sum(_bytes(block, planned) + modulation_in(block, planned) for block in component.blocks)
    return component.rest.parameters.total * planned.arithmetic.item_bytes + blocks


def unit_bytes(block: Block, planned: ComponentPlan) -> int:
    """What a block takes without its modulation, in memory of its own."""
    return aligned(_bytes(block, planned)) + TENSORS_PER_BLOCK * ALIGNMENT


def rest_bytes(block: Block, planned: ComponentPlan) -> int:
    """What lies outside the blocks takes, in memory of its own; it is never in 8 bits."""
    return aligned(block.parameters.total * planned.arithmetic.item_bytes) + TENSORS_PER_BLOCK * ALIGNMENT


def modulation_in(block: Block, planned: ComponentPlan) -> int:
    """A block's modulation, which is never in 8 bits: a few rows that every token feels."""
    return block.parameters.modulation * planned.arithmetic.item_bytes


def _bytes(block: Block, planned: ComponentPlan) -> int:
    counts = block.parameters
    wide = (counts.total - counts.matmul - counts.modulation) * planned.arithmetic.item_bytes
    scales = SCALE_BYTES * counts.matmul // FEWEST_COLUMNS if planned.is_narrow else 0
    return counts.matmul * planned.storage.item_bytes + wide + scales
