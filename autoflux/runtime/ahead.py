"""Weights that come to the device, and to pinned memory, while libraries are still being imported.

Importing what computes takes one processor for seconds, in which the disk and the link would have nothing to do. To
copy, torch is enough: threads bring what stays on the device from packs, pin memory for what will be streamed, and
read into it what lies there in an order that is known without the network. The networks that are made afterwards find
their weights there.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from autoflux.hardware.host import cores
from autoflux.models.pack_shelf import OpenPack
from autoflux.models.packs import Packed, pieces
from autoflux.models.values import Model
from autoflux.planning.terms import TRANSFORMER, Placement
from autoflux.planning.values import Plan
from autoflux.runtime.lanes import Lane, Mark, lane_for
from autoflux.runtime.memory import give_back_unused
from autoflux.runtime.pack_file import PAGE, PackFile, checksum, open_pack, side_by_side
from autoflux.runtime.pinned import PinnedAhead, PinnedBuffer, offered
from autoflux.runtime.portions import PinnedUnit, Portion, holds_as_brought, portion
from autoflux.runtime.warming import warm_up
from autoflux.units import MIB

WINDOW_BYTES = 16 * MIB
"""What a thread reads and copies at once. It waits for its turn to compute some times for each."""

READERS = (4, 16)
"""At least and at most; as many threads as there are processors read, each into a pinned window of its own. Each waits
for its turn often while libraries are imported, so more of them bring more: with four, 25 GB that were in the page
cache took 6.5 s, with eight 3.5 (one H200, 16 cores of a Xeon, with a checksum that took most of their time)."""

TURN_SECONDS = 0.0005
"""How long an import computes while a thread waits for its turn; Python's 5 ms would be longer than what they wait
for."""

ALIVE_SECONDS = 0.5
"""Between two looks whether there is still somebody to wait for."""


class _Piece(NamedTuple):
    """Bytes of the file with their checksum, and where they go."""

    first: int
    length: int
    checksum: int
    target: Tensor


class _Window(NamedTuple):
    """Pieces that lie side by side, and whose they are."""

    of: _Bringing
    pieces: tuple[_Piece, ...]


class Brought(NamedTuple):
    """The weights of a pack that are there already."""

    tensors: dict[str, Tensor]
    """On the device, by their names (uint8)."""
    units: dict[tuple[str, ...], PinnedBuffer]
    """In pinned memory, by the names of the tensors that lie there."""

    def clear(self) -> None:
        """Let go of them."""
        self.tensors.clear()
        self.units.clear()


class _Bringing:
    """The weights of one pack on their way."""

    def __init__(self, opened: OpenPack, wanted: Portion, pinned: PinnedAhead, device: torch.device) -> None:
        self.brought = Brought({}, {})
        self.failed = False
        self.over = threading.Event()
        self._opened, self._wanted, self._pinned, self._device = opened, wanted, pinned, device
        self._file = PackFile(opened.weights, once=True)
        self._lock = threading.Lock()
        self._under_way = 1  # the one that hands them out

    def windows(self) -> Iterator[_Window]:
        """In the order of the file; memory is taken when a window is asked for."""
        for pieces_of_one in side_by_side(self._pieces(), WINDOW_BYTES):
            with self._lock:
                self._under_way += 1
            yield _Window(self, tuple(pieces_of_one))
        self.done_with_one()

    def bring(self, window: _Window, staging: Tensor, lane: Lane, freed: Mark) -> None:
        """Read a window into pinned memory and have it copied from there.

        Where it is copied to may be memory that a tensor left which is still computed with; `freed` is set after that.

        Raises:
            OSError, EOFError: it cannot be read.
            ValueError: a piece is not what was written.
        """
        first, last = window.pieces[0].first, window.pieces[-1]
        data = self._file.read(first, last.first + last.length, memoryview(staging.numpy()))  # type: ignore[arg-type]
        for piece in window.pieces:
            at = piece.first - first
            if checksum(data[at : at + piece.length]) != piece.checksum:
                raise ValueError(f"bytes {piece.first} to {piece.first + piece.length} are not what was written")
        lane.set_computed(freed)
        lane.copies_wait(freed)
        for piece in window.pieces:
            at = piece.first - first // PAGE * PAGE
            read = staging[at : at + piece.length]
            if piece.target.device == self._device:
                lane.copy(piece.target, read)
            else:
                piece.target.copy_(read)

    def done_with_one(self) -> None:
        """A window is there, or has failed; after the last, the file is closed."""
        with self._lock:
            self._under_way -= 1
            over = self._under_way == 0
        if over:
            self._file.close()
            self._opened.close()
            if self.failed:
                self.brought.clear()  # whoever reads the pack again says what is wrong with it
            self.over.set()

    def _pieces(self) -> Iterator[_Piece]:
        for packed, memory in self._places():
            for first, length, expected in pieces(packed):
                at = first - packed.offset
                yield _Piece(first, length, expected, memory[at : at + length])

    def _places(self) -> Iterator[tuple[Packed, Tensor]]:
        try:
            for packed in sorted(self._wanted.staying, key=lambda packed: packed.offset):
                if self.failed:
                    return
                memory = torch.empty(packed.nbytes, dtype=torch.uint8, device=self._device)
                self.brought.tensors[packed.name] = memory
                yield packed, memory
            for unit in self._wanted.pinned:
                if self.failed:
                    return
                yield from self._places_in(unit)
        except (torch.OutOfMemoryError, MemoryError, OSError):
            self.failed = True

    def _places_in(self, unit: PinnedUnit) -> Iterator[tuple[Packed, Tensor]]:
        if not unit.tensors:
            return
        buffer = self._pinned.take(unit.nbytes) or PinnedBuffer(unit.nbytes, self._device)
        self.brought.units[tuple(tensor.name for tensor in unit.tensors)] = buffer
        for packed, at in sorted(zip(unit.tensors, unit.offsets, strict=True), key=lambda place: place[0].offset):
            yield packed, buffer.tensor[at : at + packed.nbytes]


class Ahead:
    """What is brought and pinned for one plan; begins at once."""

    def __init__(self, portions: Sequence[tuple[OpenPack, Portion]], device: torch.device) -> None:
        self._device = device
        self._bringing: dict[str, _Bringing] = {}
        self._given: list[Brought] = []
        self.pinned = PinnedAhead([unit.nbytes for _, held in portions for unit in held.pinned], device)
        for opened, held in portions:
            if held.staying or any(unit.tensors for unit in held.pinned):
                with contextlib.suppress(OSError):  # who reads it again says that it is gone
                    self._bringing[opened.pack.key] = _Bringing(opened, held, self.pinned, device)
        self._windows = itertools.chain.from_iterable([b.windows() for b in self._bringing.values()])
        self._lock = threading.Lock()
        least, most = READERS
        readers = range(max(least, min(most, cores())) if self._bringing else 0)
        self._threads = [threading.Thread(target=self._read, name="bring-ahead", daemon=True) for _ in readers]
        for thread in self._threads:
            thread.start()

    def take(self, key: str) -> Brought:
        """The weights of that pack, once they are there; none if they were not brought, or in vain."""
        bringing = self._bringing.pop(key, None)
        while bringing and not bringing.over.wait(ALIVE_SECONDS):
            if not any(thread.is_alive() for thread in self._threads):  # none was given memory
                bringing = None
        brought = bringing.brought if bringing else Brought({}, {})
        self._given.append(brought)
        return brought

    def close(self) -> None:
        """Bring nothing more, and let go of what nobody took."""
        for bringing in self._bringing.values():
            bringing.failed = True
        for thread in self._threads:
            thread.join()
        self._bringing.clear()
        for brought in self._given:
            brought.clear()  # of which something may have been in vain
        self.pinned.close()

    def _read(self) -> None:
        staging = PinnedBuffer(WINDOW_BYTES + 2 * PAGE, self._device)
        lane = lane_for(self._device)
        copied, freed = lane.mark(), lane.mark()
        while window := self._next():
            try:
                if not window.of.failed:
                    window.of.bring(window, staging.tensor, lane, freed)
            except (OSError, EOFError, ValueError, RuntimeError):
                window.of.failed = True
            finally:
                # The memory is written again, and whoever takes the weights computes with them.
                lane.set_copied(copied)
                copied.synchronize()
                window.of.done_with_one()

    def _next(self) -> _Window | None:
        with self._lock:
            return next(self._windows, None)


_current: Ahead | None = None


@contextmanager
def bringing_ahead(
    plan: Plan, model: Model, unread: Collection[str] = (), *, as_packed: bool = False
) -> Iterator[bool]:
    """For the time of the context, bring and pin what the plan's packs have, but for components named in `unread`.

    `as_packed` says that the transformer will have its tensors as the pack has them. Gives whether there is anything
    to bring.
    """
    global _current  # noqa: PLW0603 — those who make networks are called by backends, which know nothing of it
    is_there = not plan.device.startswith("cuda") or torch.cuda.is_available()
    portions = list(_portions(plan, model, unread, as_packed=as_packed)) if is_there else []
    if not portions:
        yield False
        return
    turn = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    _current = ahead = Ahead(portions, torch.device(plan.device))
    _warm_up(plan, model)
    try:
        with offered(ahead.pinned):
            yield True
    finally:
        _current = None
        sys.setswitchinterval(turn)
        ahead.close()
        give_back_unused()  # what was copied to its place


def drop_weights_ahead() -> None:
    """Bring nothing more, and free what came: of what nobody took, and of networks that were not finished."""
    if _current:
        _current.close()
    gc.collect()  # an error and what it came through hold each other


def _warm_up(plan: Plan, model: Model) -> None:
    device, transformer = torch.device(plan.device), plan.component(TRANSFORMER)
    if device.type == "cuda":
        dtype = getattr(torch, transformer.arithmetic.value)
        warm_up(device, dtype, transformer.storage if transformer.native else None, model.architecture.hidden_size)


def weights_ahead(key: str) -> Brought:
    """The weights of that pack which are there already, for as long as `bringing_ahead` lasts: see `Ahead.take`."""
    return _current.take(key) if _current else Brought({}, {})


def _portions(
    plan: Plan, model: Model, unread: Collection[str], *, as_packed: bool
) -> Iterator[tuple[OpenPack, Portion]]:
    for component in model.in_loading_order:
        planned = plan.component(component.name)
        opened = open_pack(component, planned) if component.name not in unread else None
        if opened is None:
            continue
        held = portion(opened.pack, component, plan)
        # What has other tensors gets copies of these, in memory of their own.
        copied = (
            component.name == TRANSFORMER
            and planned.placement == Placement.STREAMED
            and not (as_packed and holds_as_brought(plan))
        )
        if copied and not _fits_twice(held, plan):
            held = held._replace(staying=())
        if held.staying or held.pinned:
            yield opened, held
        else:
            opened.close()


def _fits_twice(held: Portion, plan: Plan) -> bool:
    """Whether what stays has room beside the memory that it will be copied to, and all else that is planned."""
    device = torch.device(plan.device)
    if device.type != "cuda":
        return device.type == "cpu"
    free, _ = torch.cuda.mem_get_info(device)
    free = min(free, plan.vram_limit_bytes or free)
    return free >= plan.predicted.peak_vram_bytes.peak + sum(tensor.nbytes for tensor in held.staying)
