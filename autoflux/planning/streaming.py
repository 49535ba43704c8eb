"""What streaming takes: which blocks stay, how large the ring is, and how long a pass lasts. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from autoflux.hardware.values import BlockKind
from autoflux.models.flops import image_tokens
from autoflux.models.values import Component, Model
from autoflux.planning.layers import LayerPass, layer_seconds, layers_of
from autoflux.planning.schedule import (
    ALIGNMENT,
    SLOWER_LINK,
    Unit,
    aligned,
    choose_resident,
    contended_seconds,
    filled,
)
from autoflux.planning.speed import GRAPH_HANDOFF, KINDS
from autoflux.planning.terms import Placement, TransferUnit, Waiting
from autoflux.planning.values import Arrangement, ComponentPlan, Picture
from autoflux.planning.weights import (
    TENSORS_PER_BLOCK,
    all_unit_bytes,
    component_bytes,
    largest_modulation,
    largest_unit,
    modulation_of,
    rest_bytes,
)

RING_UNITS = (1.0, 4 / 3, 2.0)
"""Sizes of the ring to try, in largest units: with one, nothing is copied while a largest block computes; with two,
one can be on its way at any time."""

LAYER_RING_UNITS = (*RING_UNITS, 3.0, 4.0)
"""The same in largest layers: the largest, which hold modulation, follow each other and compute next to nothing."""

RUNGS = 2
"""Budgets tried, a smallest unit apart: what is chosen for a budget is not always better than for a little less."""


class StreamLayout(NamedTuple):
    """How a model's weights share the device."""

    resident: tuple[int, ...]
    ring_bytes: int
    seconds_per_step: float
    seconds_on_slower_link: float

    @property
    def cost(self) -> tuple[float, float, int]:
        """What is to be least; sums of the same seconds in another order differ by less than a nanosecond."""
        return round(self.seconds_per_step, 9), round(self.seconds_on_slower_link, 9), self.ring_bytes


class Room(NamedTuple):
    """Device memory that a layout may use: for ring and blocks that stay together, and for the ring alone."""

    budget_bytes: int
    ring_limit_bytes: int

    def holds(self, ring_bytes: int, beside: int = 0) -> bool:
        """Whether the ring fits, with so many bytes that stay."""
        return beside + ring_bytes <= self.budget_bytes and ring_bytes <= self.ring_limit_bytes


def block_kinds(transformer: Component) -> list[BlockKind]:
    """Of each block in order: the first list holds double blocks, the second single ones."""
    return [kind for kind, blocks in zip(KINDS, transformer.block_lists, strict=False) for _ in blocks.blocks]


def stream_layout(
    model: Model,
    arrangement: Arrangement,
    room: Room,
    *,
    picture: Picture,
    seconds: Mapping[BlockKind, float],
    pause: float,
    bytes_per_second: float,
    all_stay: bool = False,
) -> StreamLayout:
    """The fastest way to share the room between a ring and blocks that stay: `all_stay` says that they do.

    The text encoders and the decoder pass through the ring too, whole blocks at a time. If not even the smallest ring
    fits, that one is returned.
    """
    planned = arrangement.component("transformer")
    transformer = model.component("transformer")
    kinds = block_kinds(transformer)
    rest = aligned(rest_bytes(transformer.rest, planned)) + _kept_modulation(model, arrangement)
    least = max(_largest_of_others(model, arrangement), _passing_modulation(model, arrangement))
    if arrangement.unit == TransferUnit.LAYER:
        layers = layers_of(model, planned, seconds, text_share(model, picture))
        return _by_layers(LayerPass(layers, bytes_per_second, pause), room, least)
    loads = [
        Unit(nbytes, seconds[kind]) for nbytes, kind in zip(all_unit_bytes(transformer, planned), kinds, strict=True)
    ]
    units = joined(loads, arrangement.block_bytes)
    if all_stay:
        return _all_there(units, pause, least)
    streams = least or arrangement.block_bytes or arrangement.park_for_decode
    if not streams and rest + sum(aligned(unit.nbytes) for unit in units) <= room.budget_bytes:
        return _all_there(units, pause)
    least = max(least, *(unit.nbytes for unit in units))
    found: list[StreamLayout] = []
    fewest = arrangement.park_for_decode
    for times in RING_UNITS:
        ring = max(int(times * max(unit.nbytes for unit in units)), least)
        if found and not room.holds(ring, rest):
            break
        # Numbers of joined units mean nothing to people, and whoever joins blocks wants them streamed.
        budget = 0 if arrangement.block_bytes else max(0, room.budget_bytes - rest - ring)
        search = _Search(tuple(units), ring, bytes_per_second, pause, GRAPH_HANDOFF * arrangement.graphs, fewest)
        found.append(_best_of(search, budget))
    return min(found, key=lambda layout: layout.cost)


def _all_there(units: Sequence[Unit], pause: float, ring_bytes: int = 0) -> StreamLayout:
    """No block passes through the ring, if there is one."""
    seconds = pause + sum(unit.seconds for unit in units)
    return StreamLayout(tuple(range(len(units))), ring_bytes, seconds, seconds)


def _by_layers(layers: LayerPass, room: Room, least_bytes: int) -> StreamLayout:
    """A ring for the largest layer, and for more where there is room and it is of use."""
    found: list[StreamLayout] = []
    for times in LAYER_RING_UNITS:
        ring = max(int(times * layers.largest), least_bytes)
        if found and not room.holds(ring):
            break
        found.append(StreamLayout((), ring, layer_seconds(layers, ring), layer_seconds(layers, ring, SLOWER_LINK)))
    return min(found, key=lambda layout: layout.cost)


def text_share(model: Model, picture: Picture) -> float:
    """Of text among the tokens of a picture."""
    image = image_tokens(model.architecture, picture.width, picture.height)
    return picture.text_tokens / (picture.text_tokens + image)


def joined(loads: Sequence[Unit], block_bytes: int) -> list[Unit]:
    """Blocks joined to units that stay within so many bytes, as the engine joins them."""
    units: list[Unit] = []
    for load in loads:
        if units and units[-1].nbytes + load.nbytes <= block_bytes:
            units[-1] = Unit(units[-1].nbytes + load.nbytes, units[-1].seconds + load.seconds)
        else:
            units.append(load)
    return units


class _Search(NamedTuple):
    """What residents are chosen for: see `choose_resident` and `contended_seconds`."""

    units: tuple[Unit, ...]
    ring_bytes: int
    bytes_per_second: float
    pause: float
    handoff: float
    fewest: bool


def _best_of(search: _Search, budget_bytes: int) -> StreamLayout:
    step = aligned(min(unit.nbytes for unit in search.units))
    rungs = budget_bytes // step
    tried = (_chosen(search, rung * step) for rung in range(rungs, max(-1, rungs - RUNGS), -1))
    return min(tried, key=lambda layout: layout.cost)


@lru_cache(maxsize=4096)
def _chosen(search: _Search, budget_bytes: int) -> StreamLayout:
    units, ring, rate = search.units, search.ring_bytes, search.bytes_per_second
    resident = choose_resident(units, budget_bytes, ring, rate, pause=search.pause, fewest=search.fewest)
    if search.fewest:
        return _layout(search, resident)
    more = filled(units, resident, budget_bytes)
    return min(_layout(search, resident), _layout(search, more), key=lambda layout: layout.cost)


def _layout(search: _Search, resident: frozenset[int]) -> StreamLayout:
    units, ring, rate = search.units, search.ring_bytes, search.bytes_per_second
    seconds, slower = (
        contended_seconds(units, resident, ring, share * rate, pause=search.pause, handoff=search.handoff)
        for share in (1.0, SLOWER_LINK)
    )
    return StreamLayout(tuple(sorted(resident)), ring, seconds, slower)


def arena_bytes(model: Model, arrangement: Arrangement) -> int:
    """Device memory of streamed weights: the ring, and what stays. 0 if nothing is streamed."""
    return arrangement.ring_bytes + staying_bytes(model, arrangement) if arrangement.streamed else 0


def staying_bytes(model: Model, arrangement: Arrangement) -> int:
    """Weights on the device beside the ring. Where layers are streamed, those outside of blocks are, too."""
    planned = next((c for c in arrangement.streamed if c.name == "transformer"), None)
    if planned is None or arrangement.unit == TransferUnit.LAYER:
        return 0
    transformer = model.component("transformer")
    sizes = block_bytes_of(model, planned)
    blocks = sum(aligned(sizes[i]) for i in planned.resident)
    return aligned(rest_bytes(transformer.rest, planned)) + blocks + _kept_modulation(model, arrangement)


def hoists(arrangement: Arrangement) -> bool:
    """Whether modulation is computed before the steps, so that its weights need not be there in them."""
    return (
        arrangement.component("transformer").placement == Placement.STREAMED and arrangement.unit == TransferUnit.BLOCK
    )


def block_bytes_of(model: Model, planned: ComponentPlan) -> list[int]:
    """What each block of the transformer takes without its modulation."""
    return all_unit_bytes(model.component(planned.name), planned)


def streamed_bytes(model: Model, arrangement: Arrangement) -> int:
    """Bytes that pass through the ring in a step."""
    planned = next((c for c in arrangement.streamed if c.name == "transformer"), None)
    if planned is None:
        return 0
    if arrangement.unit == TransferUnit.LAYER:
        return component_bytes(model, planned)
    return sum(size for i, size in enumerate(block_bytes_of(model, planned)) if i not in planned.resident)


def largest_streamed(model: Model, arrangement: Arrangement) -> int:
    """Bytes of the largest copy of a streamed transformer's blocks, which the ring must hold. 0 if all stay."""
    planned = arrangement.component("transformer")
    if arrangement.unit == TransferUnit.LAYER:
        return 0  # a layer's size is the backend's to know
    runs: list[list[Unit]] = [[]]
    for index, size in enumerate(block_bytes_of(model, planned)):
        if index in planned.resident:
            runs.append([])  # blocks are not joined across one that stays
        else:
            runs[-1].append(Unit(size, 0.0))
    return max((unit.nbytes for run in runs for unit in joined(run, arrangement.block_bytes)), default=0)


def pinned_bytes(model: Model, arrangement: Arrangement) -> int:
    """RAM that is pinned for streamed weights."""
    direct = [c for c in arrangement.streamed if c.waiting == Waiting.PINNED]
    through = [c for c in arrangement.streamed if c.waiting != Waiting.PINNED]
    pinned = sum(component_bytes(model, c) for c in direct if c.name != "transformer")
    if any(c.name == "transformer" for c in direct):
        parked = staying_bytes(model, arrangement) if arrangement.park_for_decode else 0
        pinned += parked + streamed_bytes(model, arrangement) + copied_modulation(model, arrangement)
    return pinned + stage_bytes(model, arrangement, through)


def stage_bytes(model: Model, arrangement: Arrangement, through: Iterable[ComponentPlan]) -> int:
    """Pinned buffers through which weights come that wait elsewhere: two of the largest unit for each component, for
    the modulation and for what is brought back after a decode, as they all read ahead for themselves."""
    total = 0
    for planned in through:
        largest = _largest_part(model.component(planned.name), planned)
        total += 2 * largest
        if planned.name == "transformer":
            total += 2 * _passing_modulation(model, arrangement) + 2 * largest * arrangement.park_for_decode
    return total


def modulation_bytes(model: Model, arrangement: Arrangement) -> int:
    """Bytes of the modulation weights where they are apart from the blocks; 0 where they are not."""
    if not hoists(arrangement):
        return 0
    return modulation_of(model.component("transformer"), arrangement.component("transformer"))


def copied_modulation(model: Model, arrangement: Arrangement) -> int:
    """Bytes of the modulation weights that pass through the ring once a picture."""
    return 0 if arrangement.keep_modulation else modulation_bytes(model, arrangement)


def _kept_modulation(model: Model, arrangement: Arrangement) -> int:
    """Device memory of those that stay."""
    if not arrangement.keep_modulation:
        return 0
    layers = TENSORS_PER_BLOCK * ALIGNMENT * len(model.component("transformer").blocks)
    return aligned(modulation_bytes(model, arrangement)) + layers


def _passing_modulation(model: Model, arrangement: Arrangement) -> int:
    """The largest that passes through the ring. A double block has two modulation layers."""
    if not copied_modulation(model, arrangement):
        return 0
    return largest_modulation(model.component("transformer"), arrangement.component("transformer"))


def _largest_of_others(model: Model, arrangement: Arrangement) -> int:
    others = (c for c in arrangement.streamed if c.name != "transformer")
    return max((_largest_part(model.component(c.name), c, whole=True) for c in others), default=0)


def _largest_part(component: Component, planned: ComponentPlan, *, whole: bool = False) -> int:
    """The largest block; what lies outside the blocks counts only for components that stream `whole`."""
    outside = [rest_bytes(component.rest, planned)] if whole or planned.name != "transformer" else []
    return max([largest_unit(component, planned), *outside])
