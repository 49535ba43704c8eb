"""Modules set up to run in a given amount of device memory: all parts of the engine put together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from autoflux.models.values import Precision
from autoflux.planning.footprint import WIDE_BLOCKS
from autoflux.planning.schedule import aligned
from autoflux.runtime.compiling import compile_blocks
from autoflux.runtime.graphs import BlockGraphs, CudaTape
from autoflux.runtime.modulation import Modulation
from autoflux.runtime.pinned import PinnedBuffer
from autoflux.runtime.quantized import quantize_linears
from autoflux.runtime.ring import Arena
from autoflux.runtime.sources import HostUnits, in_order
from autoflux.runtime.stores import AheadStore, Store, read_tensors_of
from autoflux.runtime.streamer import MakeSource, Streamer
from autoflux.runtime.units import Atom, Unit, apart_from, block_atoms, make_units, rest_of, staying_of

NARROW = (Precision.FLOAT8, Precision.INT8)


class StreamedModule:
    """A module cut into units, which `attach` puts under a streamer.

    What lies outside the atoms, and the atoms numbered in `resident`, will stay on the device.
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
        self.units = make_units(atoms, block_bytes, alone=resident)
        staying = {atoms[i].module for i in resident}
        self.resident = frozenset(i for i, unit in enumerate(self.units) if unit.atoms[0].module in staying)
        """Numbers of the units that stay."""
        self._wraps = wraps
        self._placed: list[Unit] = []
        self._streamer: Streamer | None = None

    @property
    def staying_bytes(self) -> int:
        """What it needs of the arena's resident part."""
        return sum(aligned(unit.nbytes) for unit in apart_from(self._placed, self._staying))

    def place_ahead(self, store: AheadStore, device: torch.device) -> None:
        """Before `attach`: leave what stays and is on the device already where it is, outside of the arena."""
        self._placed = [unit for unit in self._staying if store.point_ahead(unit, device)]

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
            self.module,
            self.units,
            arena,
            self.resident,
            placed=self._placed,
            wraps=self._wraps,
            store=store,
            make_source=make_source,
        )

    def drop(self) -> None:
        """Let go of the weights and of whatever brings them; the module cannot be used any more."""
        if self._streamer:
            self._streamer.close()
            self._streamer = None
            self._placed.clear()

    def detach(self) -> None:
        """Move them back."""
        if self._streamer:
            self._streamer.detach()
            self._streamer = None
            for piece in (piece for unit in self._placed for piece in unit.pieces):
                piece.tensor.data = piece.tensor.data.cpu()  # where networks of packs are made
            self._placed.clear()

    @property
    def _staying(self) -> list[Unit]:
        return staying_of(self.module, self.units, self.resident)


@dataclass(frozen=True)
class Holding:
    """How a transformer's weights are held and computed with."""

    resident: frozenset[int] = frozenset()
    """Numbers of the blocks that stay on the device."""
    block_bytes: int = 0
    """Blocks that follow each other are copied together as long as they are no larger than this; 0 for one by one."""
    storage: Precision = Precision.BFLOAT16
    native: bool = False
    """Multiply in the narrow format."""
    hoist: bool = True
    """Compute the modulation of all steps before the first."""
    keep_modulation: bool = False
    """With its weights on the device for good, instead of streamed for each picture."""
    compiled: bool = False
    graphs: bool = False
    """Replay blocks from CUDA graphs, where the device has them."""


class StreamedTransformer:
    """A transformer prepared as `Holding` says: modulation taken out, blocks narrowed; then attached to an arena.

    With hoisting, call `modulation` with the embeddings of all steps of a picture, and `select` rows of what it gives
    before each pass. `detach` puts everything back but the precision of the weights.

    `atoms`, if given, are the layers of the transformer as it came, in the order they run: they are streamed instead of
    whole blocks. With hoisting only those inside of blocks are, because others make the embeddings.
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
            narrow_blocks(self._blocks, holding.storage, native=holding.native, device=device)
        streamed = self._layers(transformer, atoms) if atoms else self._blocks
        self.blocks = StreamedModule(
            transformer, streamed, resident=self._resident(streamed), block_bytes=holding.block_bytes, wraps=True
        )
        self.parts = [self.blocks]
        if self._modulation:
            linears = self._modulation.atoms()
            staying = range(len(linears)) if holding.keep_modulation else ()
            self.parts.append(StreamedModule(self._modulation, linears, resident=staying))
        self._stop_compiling: Callable[[], None] | None = None
        if holding.compiled:
            self._stop_compiling = compile_blocks(block.module for block in self._blocks)
        self._graphs: BlockGraphs | None = None
        if holding.graphs and device.type == "cuda":
            self._graphs = BlockGraphs((block.module for block in self._blocks), CudaTape(device))

    def _layers(self, transformer: nn.Module, atoms: Iterable[Atom]) -> list[Atom]:
        """What is in the places of these layers now, when modulation was taken out and linears were narrowed."""
        names = [atom.name for atom in atoms if not self.holding.hoist or self._number(atom) is not None]
        return [Atom(name, transformer.get_submodule(name)) for name in names]

    def _resident(self, atoms: Sequence[Atom]) -> frozenset[int]:
        """Numbers of the atoms that are, or lie in, blocks that stay."""
        return frozenset(i for i, atom in enumerate(atoms) if self._number(atom) in self.holding.resident)

    def _number(self, atom: Atom) -> int | None:
        """Of the block that the atom is or lies in."""
        inside = (i for i, block in enumerate(self._blocks) if f"{atom.name}.".startswith(f"{block.name}."))
        return next(inside, None)

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

    def forget_graphs(self) -> None:
        """Let go of the memory that graphs of blocks take, and of what they say about where weights are."""
        if self._graphs:
            self._graphs.forget()

    def run_as_written(self) -> None:
        """From now on blocks are neither compiled nor replayed."""
        if self._graphs:
            self._graphs.undo()
            self._graphs = None
        if self._stop_compiling:
            self._stop_compiling()
            self._stop_compiling = None

    def detach(self) -> None:
        """Put everything back as it was, but for the precision of the weights."""
        self.run_as_written()
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


def narrow_blocks(blocks: Iterable[Atom], storage: Precision, *, native: bool, device: torch.device) -> None:
    """Hold the matrices of these blocks in 8 bits, but for the modulation; computed on `device`, where they lay.

    Layer after layer lets go of its wide weights, so that memory peaks at the wide ones and one narrow layer.
    """
    for block in blocks:
        quantize_linears(block.module, storage, native=native, keep=stays_wide, device=device)


def load_narrow(
    transformer: nn.Module,
    blocks: Sequence[Atom],
    store: Store,
    storage: Precision,
    *,
    native: bool,
    device: torch.device,
) -> None:
    """Fill a transformer that has no weights yet, and hold it as `narrow_blocks` does.

    A block is read while the one before it is narrowed, into memory that is used again and again, so that RAM peaks at
    the narrow weights and two wide blocks.

    Raises:
        As `Store.read`.
    """
    units = make_units(blocks, 0)
    rest = rest_of(transformer, units)
    largest = max((unit.nbytes for unit in units), default=0)
    buffers = cycle([PinnedBuffer(largest, device) for _ in range(WIDE_BLOCKS)])

    def next_memory(unit: Unit) -> Tensor:
        return next(buffers).tensor[: unit.nbytes]

    for unit, memory in in_order(store, units, next_memory, at_once=WIDE_BLOCKS):
        unit.point_at(memory)
        narrow_blocks(unit.atoms, storage, native=native, device=device)
        _move_out(unit.atoms, memory)
    read_tensors_of(store, (piece.tensor for piece in rest.pieces) if rest else ())


def _move_out(atoms: Sequence[Atom], memory: Tensor) -> None:
    """Give what was not narrowed memory of its own, for this will be written again."""
    begin = memory.data_ptr()
    for atom in atoms:
        for tensor in (*atom.module.parameters(), *atom.module.buffers()):
            if begin <= tensor.data_ptr() < begin + memory.numel():
                tensor.data = tensor.data.clone()


def stays_wide(name: str, _linear: nn.Linear) -> bool:
    """Whether a layer of a block, by its name in it, is not to be narrowed. `models.packs` goes by the same rule."""
    # The modulation is a few rows that every token feels; narrow it would cost quality and save no time.
    return "norm" in name
