"""What streaming takes: which blocks stay, how large the ring is, and how long a pass lasts. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from autoflux.models.values import Block, Component, Model, Precision
from autoflux.planning.schedule import ALIGNMENT, Unit, aligned, choose_resident, pass_seconds
from autoflux.planning.values import Arrangement, Waiting

TENSORS_PER_BLOCK = 32
"""Upper bound of the tensors of a block; each begins at a multiple of the alignment. FLUX's double block has 24."""

RING_UNITS = (1.0, 4 / 3, 2.0)
"""Sizes of the ring to try, in largest units: with one, nothing is copied while a largest block computes; with two,
one can be on its way at any time."""


class StreamLayout(NamedTuple):
    """How a model's weights share the device."""

    resident: tuple[int, ...]
    ring_bytes: int
    seconds_per_step: float


def stream_layout(
    model: Model,
    precision: Precision,
    *,
    budget_bytes: int,
    ring_limit_bytes: int,
    block_seconds: float,
    bytes_per_second: float,
) -> StreamLayout:
    """The fastest way to share `budget_bytes` between a ring and blocks that stay.

    The ring alone takes at most `ring_limit_bytes`. The text encoders and the decoder pass through it too, whole blocks
    at a time. If not even the smallest ring fits, that one is returned.
    """
    transformer = model.component("transformer")
    rest = _staying(transformer, precision, ())
    units = [Unit(_bytes(block, precision), block_seconds) for block in transformer.blocks]
    largest = max(unit.nbytes for unit in units)
    least = max(largest, _largest_of_others(model, precision), _largest_modulation(transformer, precision))
    found: list[StreamLayout] = []
    for times in RING_UNITS:
        ring = max(int(times * largest), least)
        if found and (rest + ring > budget_bytes or ring > ring_limit_bytes):
            break
        resident = choose_resident(units, max(0, budget_bytes - rest - ring), ring, bytes_per_second)
        seconds = pass_seconds(units, resident, ring, bytes_per_second)
        found.append(StreamLayout(tuple(sorted(resident)), ring, seconds))
    return min(found, key=lambda layout: (layout.seconds_per_step, layout.ring_bytes))


def arena_bytes(model: Model, arrangement: Arrangement) -> int:
    """Device memory of streamed weights: the ring, and what stays. 0 if nothing is streamed."""
    return arrangement.ring_bytes + staying_bytes(model, arrangement) if arrangement.streamed else 0


def staying_bytes(model: Model, arrangement: Arrangement) -> int:
    """Weights on the device beside the ring."""
    transformers = (c for c in arrangement.streamed if c.name == "transformer")
    return sum(_staying(model.component(c.name), c.storage, c.resident) for c in transformers)


def streamed_bytes(model: Model, arrangement: Arrangement) -> int:
    """Bytes that pass through the ring in a step."""
    transformer = next((c for c in arrangement.streamed if c.name == "transformer"), None)
    if transformer is None:
        return 0
    blocks = model.component("transformer").blocks
    return sum(_bytes(b, transformer.storage) for i, b in enumerate(blocks) if i not in transformer.resident)


def pinned_bytes(model: Model, arrangement: Arrangement) -> int:
    """RAM that is pinned for streamed weights."""
    if not arrangement.streamed:
        return 0
    precision = arrangement.streamed[0].storage
    if arrangement.waiting != Waiting.PINNED:
        return stage_bytes(model, precision)
    others = (c for c in arrangement.streamed if c.name != "transformer")
    return (
        (staying_bytes(model, arrangement) if arrangement.park_for_decode else 0)
        + streamed_bytes(model, arrangement)
        + modulation_bytes(model, precision)
        + sum(model.component(c.name).bytes_as(c.storage) for c in others)
    )


def stage_bytes(model: Model, precision: Precision) -> int:
    """Pinned buffer through which weights come that wait elsewhere: two of the largest unit for each component and
    the modulation, as they all read ahead for themselves."""
    parts = [max(_bytes(b, precision) for b in model.component("transformer").blocks)]
    parts += [_largest_part(c, precision) for c in model.components if c.name != "transformer"]
    parts.append(_largest_modulation(model.component("transformer"), precision))
    return 2 * sum(parts)


def modulation_bytes(model: Model, precision: Precision) -> int:
    """Bytes of the modulation weights, which pass through the ring once a picture."""
    blocks = model.component("transformer").blocks
    return sum(block.parameters.modulation for block in blocks) * precision.item_bytes


def _staying(transformer: Component, precision: Precision, resident: Iterable[int]) -> int:
    blocks = sum(aligned(_bytes(transformer.blocks[i], precision)) for i in resident)
    return aligned(_bytes(transformer.rest, precision)) + blocks


def _bytes(block: Block, precision: Precision) -> int:
    """What a block takes without its modulation."""
    count = block.parameters.total - block.parameters.modulation
    return count * precision.item_bytes + TENSORS_PER_BLOCK * ALIGNMENT


def _largest_of_others(model: Model, precision: Precision) -> int:
    others = (component for component in model.components if component.name != "transformer")
    return max(_largest_part(component, precision) for component in others)


def _largest_part(component: Component, precision: Precision) -> int:
    return max(_bytes(part, precision) for part in (component.rest, *component.blocks))


def _largest_modulation(transformer: Component, precision: Precision) -> int:
    # A double block has two modulation layers.
    return max(block.parameters.modulation for block in transformer.blocks) * precision.item_bytes
