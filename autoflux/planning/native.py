"""What a library's own offload takes, reckoned so that it takes less: how it works is the library's business."""

from __future__ import annotations

from collections.abc import Sequence

from autoflux.models.values import Model
from autoflux.planning.terms import Placement
from autoflux.planning.values import Arrangement, ComponentPlan

PINNED_EXCESS = 1.6
"""RAM in sizes of the weights. diffusers pins every tensor by itself, which torch rounds up to a power of two: 37.2 GB
for the 23.8 GB of FLUX.1-dev's transformer in bfloat16, 1.563 times (reckoned from its shapes)."""

PASSING_PARTS = 2
"""Parts (blocks, embedding tables) on the device beside what stays: one that computes, one on its way. DiffSynth and
diffusers bring layers, which are smaller."""


def left_to_backend(components: Sequence[ComponentPlan]) -> tuple[ComponentPlan, ...]:
    """The components that the backend's library brings."""
    return tuple(c for c in components if c.placement == Placement.NATIVE)


def passing_bytes(model: Model, components: Sequence[ComponentPlan]) -> int:
    """Device memory for what passes through; 0 if nothing is left to the backend."""
    parts = [
        part.parameters.total * planned.storage.item_bytes
        for planned in left_to_backend(components)
        for part in (model.component(planned.name).rest, *model.component(planned.name).blocks)
    ]
    return PASSING_PARTS * max(parts, default=0)


def on_device_bytes(model: Model, arrangement: Arrangement, names: Sequence[str]) -> int:
    """Device memory at most while these components are used."""
    used = [c for c in left_to_backend(arrangement.components) if c.name in names]
    weights = sum(model.component(c.name).bytes_as(c.storage) for c in used)
    passing = passing_bytes(model, arrangement.components)
    return min(weights, arrangement.ring_bytes + passing)


def ram_bytes(model: Model, components: Sequence[ComponentPlan]) -> int:
    """RAM for what is left to the backend."""
    weights = sum(model.component(c.name).bytes_as(c.storage) for c in left_to_backend(components))
    return int(PINNED_EXCESS * weights)
