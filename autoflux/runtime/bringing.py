"""Reading weights to a device for good: from a store into pinned buffers, used in turn, and on to their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from autoflux.runtime.lanes import Lane
from autoflux.runtime.pinned import PinnedBuffer
from autoflux.runtime.sources import READ_AT_ONCE, in_order
from autoflux.runtime.stores import AheadStore, Store
from autoflux.runtime.units import Piece, Unit
from autoflux.units import MIB

BRING_BYTES = 64 * MIB
"""What is brought at once, unless a single tensor is larger."""


class Part(NamedTuple):
    """Some tensors of a unit that lie side by side, as a unit, and where it begins in the whole."""

    unit: Unit
    begin: int


def parts_of(whole: Unit, most_bytes: int = BRING_BYTES) -> Iterator[Part]:
    """A unit in parts of at most so many bytes, or of a single tensor."""
    held: list[Piece] = []
    for piece in whole.pieces:
        if held and piece.offset + piece.nbytes - held[0].offset > most_bytes:
            yield _part(whole, held, piece.offset)
            held = []
        held.append(piece)
    if held:
        yield _part(whole, held, whole.nbytes)


def _part(whole: Unit, pieces: Sequence[Piece], end: int) -> Part:
    begin = pieces[0].offset
    moved = tuple(Piece(piece.tensor, piece.offset - begin) for piece in pieces)
    return Part(Unit(whole.atoms, moved, end - begin), begin)


def forget_ahead(store: Store | None) -> None:
    """Once all that is to stay was brought from a store: give up the device's memory of what was there in vain."""
    if isinstance(store, AheadStore):
        store.forget_ahead()


def bring(store: Store, targets: Sequence[tuple[Unit, Tensor]], device: torch.device, lane: Lane) -> None:
    """Read each unit, in order and several ahead, to its bytes of the device; what is there already is only copied.

    Raises:
        As `Store.read`; nothing is under way any more then.
    """
    if isinstance(store, AheadStore):
        targets = [(unit, target) for unit, target in targets if not store.copy_ahead(unit, target)]
    buffers: list[PinnedBuffer | None] = [None] * (READ_AT_ONCE + 1)
    copies = [lane.mark() for _ in targets]
    numbers = count()
    # The memory may come from a tensor that is still computed with.
    freed = lane.mark()
    lane.set_computed(freed)
    lane.copies_wait(freed)

    def next_memory(unit: Unit) -> Tensor:
        number = next(numbers)
        if number >= len(buffers):
            copies[number - len(buffers)].synchronize()
        turn = number % len(buffers)
        buffer = buffers[turn]
        # Few tensors are larger than the rest: not all buffers are to hold the largest.
        if buffer is None or buffer.nbytes < unit.nbytes:
            buffers[turn] = None
            buffers[turn] = buffer = PinnedBuffer(max(unit.nbytes, BRING_BYTES), device)
        return buffer.tensor[: unit.nbytes]

    read = in_order(store, (unit for unit, _ in targets), next_memory, at_once=READ_AT_ONCE)
    try:
        for (_, target), copied, (_, memory) in zip(targets, copies, read, strict=True):
            lane.copy(target, memory)
            lane.set_copied(copied)
            lane.computation_waits(copied)
    finally:
        # Their memory on the host must not be freed before they are through.
        last = lane.mark()
        lane.set_copied(last)
        last.synchronize()
