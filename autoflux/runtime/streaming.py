"""Modules set up to run in a given amount of device memory: all parts of the engine put together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoflux.models.values import Precision
from autoflux.planning.schedule import aligned
from autoflux.runtime.compiling import compile_blocks
from autoflux.runtime.modulation import Modulation
from autoflux.runtime.quantized import quantize_linears
from autoflux.runtime.ring import Arena
from autoflux.runtime.sources import HostUnits
from autoflux.runtime.stores import Store
from autoflux.runtime.streamer import MakeSource, Streamer
from autoflux.runtime.units import Atom, block_atoms, make_units, rest_of

NARROW = (Precision.FLOAT8, Precision.INT8)


class StreamedModule:
    """A module cut into units, which `attach` puts under a streamer.

    What lies outside the atoms, and the units numbered in `resident`, will stay on the device.
    """

    def __init__(
        self,
        module: nn.Module,
        atoms: Sequence[Atom],
        *,
        resident: Collection[int] = (),
        block_bytes: int = 0,
        wraps: bool = False,
    ) -> None:
        self.module = module
        self.units = make_units(atoms, block_bytes)
        self.resident = frozenset(resident)
        self._wraps = wraps
        self._streamer: Streamer | None = None

    @property
    def staying_bytes(self) -> int:
        """What it needs of the arena's resident part."""
        rest = rest_of(self.module, self.units)
        blocks = sum(aligned(self.units[i].nbytes) for i in self.resident)
        return blocks + (aligned(rest.nbytes) if rest else 0)

    @property
    def largest_streamed(self) -> int:
        """What its largest streamed unit needs of the ring."""
        sizes = (aligned(unit.nbytes) for i, unit in enumerate(self.units) if i not in self.resident)
        return max(sizes, default=0)

    @property
    def streamer(self) -> Streamer:
        """The streamer that holds the weights while attached."""
        assert self._streamer is not None, "not attached"  # noqa: S101
        return self._streamer

    def attach(self, arena: Arena, *, store: Store | None = None, make_source: MakeSource = HostUnits) -> None:
        """Move the weights to where they will be."""
        self._streamer = Streamer(
            self.module, self.units, arena, self.resident, wraps=self._wraps, store=store, make_source=make_source
        )

    def drop(self) -> None:
        """Let go of the weights and of whatever brings them; the module cannot be used any more."""
        if self._streamer:
            self._streamer.close()
            self._streamer = None

    def detach(self) -> None:
        """Move them back."""
        if self._streamer:
            self._streamer.detach()
            self._streamer = None


@dataclass(frozen=True)
class Holding:
    """How a transformer's weights are held and computed with."""

    resident: frozenset[int] = frozenset()
    """Numbers of the units that stay on the device."""
    block_bytes: int = 0
    """What one copy moves at least; 0 for a block."""
    storage: Precision = Precision.BFLOAT16
    native: bool = False
    """Multiply in the narrow format."""
    hoist: bool = True
    """Compute the modulation of all steps before the first."""
    compiled: bool = False


class StreamedTransformer:
    """A transformer prepared as `Holding` says: modulation taken out, blocks narrowed; then attached to an arena.

    With hoisting, call `modulation` with the embeddings of all steps of a picture, and `select` rows of what it gives
    before each pass. `detach` puts everything back but the precision of the weights.
    """

    def __init__(
        self,
        transformer: nn.Module,
        block_lists: Sequence[str],
        holding: Holding,
        device: torch.device,
        *,
        atoms: Sequence[Atom] | None = None,
    ) -> None:
        self.holding = holding
        self._blocks = block_atoms(transformer, block_lists)
        self._modulation = Modulation.taken_from(self._blocks) if holding.hoist else None
        if holding.storage in NARROW:
            _narrow(self._blocks, holding, device)
        self.blocks = StreamedModule(
            transformer, atoms or self._blocks, resident=holding.resident, block_bytes=holding.block_bytes, wraps=True
        )
        self.parts = [self.blocks]
        if self._modulation:
            self.parts.append(StreamedModule(self._modulation, self._modulation.atoms()))
        self._stop_compiling: Callable[[], None] | None = None
        if holding.compiled:
            self._stop_compiling = compile_blocks(block.module for block in self._blocks)

    def attach(self, arena: Arena) -> None:
        """Move the weights to where they will be."""
        for part in self.parts:
            part.attach(arena)

    def modulation(self, embeddings: Iterable[Tensor]) -> Tensor:
        """Modulation of every step, (steps, width), from the embedding of each, (1, hidden)."""
        assert self._modulation is not None, "not hoisted"  # noqa: S101
        rows: Tensor = self._modulation(torch.cat(list(embeddings)))
        self.blocks.streamer.prefetch()
        return rows

    def select(self, rows: Tensor) -> None:
        """Use these rows, (batch, width), in the next pass."""
        assert self._modulation is not None, "not hoisted"  # noqa: S101
        self._modulation.select(rows)

    def detach(self) -> None:
        """Put everything back as it was, but for the precision of the weights."""
        if self._stop_compiling:
            self._stop_compiling()
        for part in reversed(self.parts):
            part.detach()
        if self._modulation:
            self._modulation.restore()


def arena_for(parts: Iterable[StreamedModule], ring_bytes: int, device: torch.device, *, parks: bool = False) -> Arena:
    """An arena with room for what stays of all parts, and a ring for the largest of their units at least."""
    every = list(parts)
    ring = max(part.largest_streamed for part in every)
    return Arena(
        device,
        resident_bytes=sum(part.staying_bytes for part in every),
        ring_bytes=max(ring, ring_bytes) if ring else 0,
        parks=parks,
    )


def _narrow(blocks: Iterable[Atom], holding: Holding, device: torch.device) -> None:
    for block in blocks:
        quantize_linears(block.module, holding.storage, native=holding.native, keep=stays_wide, device=device)


def stays_wide(name: str, _linear: nn.Linear) -> bool:
    """Whether a layer of a block, by its name in it, is not to be narrowed. `models.packs` goes by the same rule."""
    # The modulation is a few rows that every token feels; narrow it would cost quality and save no time.
    return "norm" in name
