"""What of a pack stays on the device and what waits in pinned memory, told by names, before there is a network."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from autoflux.models.packs import Pack, Packed, is_modulation
from autoflux.models.values import Component
from autoflux.planning.schedule import aligned
from autoflux.planning.terms import TRANSFORMER, Placement, TransferUnit, Waiting
from autoflux.planning.values import Plan
from autoflux.runtime.allocator import segments_grow


class PinnedUnit(NamedTuple):
    """What waits in pinned memory of its own."""

    nbytes: int
    """Where a library joins tensors they may be padded less; not in FLUX.1, whose widths need no padding."""
    tensors: tuple[Packed, ...] = ()
    """In the order they lie there; empty if only the network tells it."""

    @property
    def offsets(self) -> Iterator[int]:
        """Where each begins."""
        return accumulate((aligned(tensor.nbytes) for tensor in self.tensors[:-1]), initial=0)


class Portion(NamedTuple):
    """Of a pack, how a plan has it held."""

    staying: tuple[Packed, ...] = ()
    """Tensors that come to the device once."""
    pinned: tuple[PinnedUnit, ...] = ()
    """In the order they are asked for."""


class _Place(NamedTuple):
    """Where a tensor belongs: a block by its number, or None outside; and its layer, if that is streamed by itself."""

    block: int | None
    layer: str = ""


def portion(pack: Pack, component: Component, plan: Plan) -> Portion:
    """What is known of it beforehand: nothing where layers are streamed, or several blocks at once."""
    planned = plan.component(component.name)
    if planned.placement == Placement.DEVICE:
        return Portion(staying=pack.tensors)
    whole_blocks = plan.unit == TransferUnit.BLOCK and not plan.block_bytes
    if planned.placement != Placement.STREAMED or planned.waiting != Waiting.PINNED or not whole_blocks:
        return Portion()
    hoists = component.name == TRANSFORMER and plan.hoist_modulation
    resident = frozenset(planned.resident)
    staying: list[Packed] = []
    units: dict[_Place, list[Packed]] = defaultdict(list)
    for tensor, place in _placed(pack, component, hoists=hoists):
        streamed = place.block is not None and place.block not in resident
        if (place.layer and not plan.keep_modulation) or (streamed and not place.layer):
            units[place].append(tensor)
        elif component.name == TRANSFORMER:  # of others, what is outside of blocks may be streamed, too
            staying.append(tensor)
    # What a parking arena holds comes from pinned memory each time.
    return Portion(() if plan.park_for_decode else tuple(staying), _in_turn(units))


def holds_as_brought(plan: Plan) -> bool:
    """Whether what stays is left in the memory that its tensors were brought to, each by itself.

    Not where it leaves for each decode, and not where torch would give many of them a segment of their own, which would
    take up to 0.3 GB more.
    """
    cuts = not plan.device.startswith("cuda") or segments_grow(os.environ, sys.platform)
    return cuts and not plan.park_for_decode


def _placed(pack: Pack, component: Component, *, hoists: bool) -> Iterator[tuple[Packed, _Place]]:
    for tensor in pack.tensors:
        number = _number(tensor.name, component)
        hoisted = hoists and number is not None and is_modulation(tensor.name)
        yield tensor, _Place(number, tensor.name.rpartition(".")[0] if hoisted else "")


def _number(name: str, component: Component) -> int | None:
    """Of the block that has a tensor, counted through all lists."""
    before = 0
    for blocks in component.block_lists:
        if name.startswith(f"{blocks.path}."):
            return before + int(name.removeprefix(f"{blocks.path}.").partition(".")[0])
        before += len(blocks.blocks)
    return None


def _in_turn(units: Mapping[_Place, Sequence[Packed]]) -> tuple[PinnedUnit, ...]:
    """Blocks, then what is taken out of them: as they are loaded.

    In a block tensors lie as the library that computes it has them; of a layer, the weight comes first in every one.
    """
    blocks = [PinnedUnit(_aligned_sum(tensors)) for place, tensors in units.items() if not place.layer]
    layers = [
        PinnedUnit(_aligned_sum(tensors), tuple(sorted(tensors, key=_weight_first)))
        for place, tensors in units.items()
        if place.layer
    ]
    return (*blocks, *layers)


def _aligned_sum(tensors: Sequence[Packed]) -> int:
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def _weight_first(tensor: Packed) -> bool:
    return not tensor.name.endswith(".weight")
