"""Loading packs: straight reads into the memory where weights will be, checked on the way, several at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autoflux.errors import DamagedPack, UnreadablePack
from autoflux.models.formats import SAFETENSORS
from autoflux.models.naming import plain_name
from autoflux.models.pack_shelf import OpenPack
from autoflux.models.packs import NOT_THERE, PIECE_BYTES, SCALE, Packed, pieces
from autoflux.models.values import Precision
from autoflux.planning.terms import Placement, Waiting
from autoflux.planning.values import ComponentPlan
from autoflux.runtime.ahead import Brought, weights_ahead
from autoflux.runtime.bringing import bring, forget_ahead, parts_of
from autoflux.runtime.lanes import Lane, lane_for
from autoflux.runtime.pack_file import PackFile, checksum, side_by_side
from autoflux.runtime.pinned import PinnedBuffer
from autoflux.runtime.quantized import QuantizedLinear
from autoflux.runtime.sources import READ_AT_ONCE, in_order
from autoflux.runtime.stores import Rows, Store
from autoflux.runtime.units import Unit, rest_of

Joined = Mapping[str, Sequence[Rows]]
"""For tensors of a network that a pack holds in several: what they are put together of. See `FileStore`."""

READERS = 8
"""Pieces that are read and checked at once: disks answer several requests faster than one, and while some are checked
others are read. More than there are processors: they mostly wait for the disk."""

_ALL = -1
"""Where a row ends that is the last, whatever its number."""

_log = logging.getLogger(__name__)


class _Slice(NamedTuple):
    """Bytes `begin` to `end` of a tensor in the pack."""

    packed: Packed
    begin: int
    end: int

    @property
    def is_whole(self) -> bool:
        return self.begin == 0 and self.end == self.packed.nbytes


class _Job(NamedTuple):
    """A piece of the file, and where bytes `begin` to `end` of it go."""

    first: int
    length: int
    checksum: int
    begin: int
    end: int
    target: memoryview


class PackStore:
    """The bytes of units, read from a pack when they are asked for. See `Store`.

    Each piece is checked when it is read for the first time. A pack with one that is not what was written is dropped,
    so that nobody meets it again; one that cannot be read now stays.
    """

    def __init__(
        self,
        network: nn.Module,
        opened: OpenPack,
        joined: Joined | None = None,
        *,
        once: bool = False,
        coming: Callable[[], Brought] | None = None,
    ) -> None:
        """For a network whose parameters have the formats of the pack, see `make_fitting`. `once` says that each unit
        is read once only; `coming` waits for what of the pack comes by itself, and is called when that is needed.

        Raises:
            DamagedPack: the pack lacks a weight of the network, or is gone; it was dropped.
            UnreadablePack: it cannot be opened now.
        """
        self._opened = opened
        held = {packed.name: packed for packed in opened.pack.tensors}
        state = network.state_dict(keep_vars=True)
        self._places: dict[int, tuple[_Slice, ...]] = {}
        self._lock = threading.Lock()
        self._given_up = False
        for name, tensor in state.items():
            # One of several names of a tied weight is enough.
            if places := _slices(name, tensor, held, joined or {}):
                self._places[id(tensor)] = places
        for name, tensor in state.items():
            if id(tensor) not in self._places:
                raise self._damaged(f"the weight {name!r} of shape {tuple(tensor.shape)} is missing")
        # Buffers that are computed and not saved, as they are before anything is re-pointed.
        self._computed = {id(t): t.data for t in network.buffers() if id(t) not in self._places}
        self._checked: set[int] = set()
        self._coming = coming
        try:
            self._file = PackFile(opened.weights, once=once)
        except OSError as error:
            raise self._unreadable(error) from error
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="pack")

    @cached_property
    def _brought(self) -> Brought:
        """What is there without having been read by this store."""
        return self._coming() if self._coming else Brought({}, {})

    def read(self, unit: Unit, target: Tensor) -> None:
        """See `Store.read`.

        Raises:
            DamagedPack: a piece is not what was written; the pack was dropped.
            UnreadablePack: a piece cannot be read now.
        """
        jobs: list[_Job] = []
        for view, piece in zip(unit.views(target), unit.pieces, strict=True):
            places = self._places.get(id(piece.tensor))
            if places is None:
                view.copy_(self._computed[id(piece.tensor)])
            else:
                jobs += _jobs(places, view)
        windows = list(side_by_side(sorted(jobs, key=lambda job: job.first), PIECE_BYTES))
        for done in map(self._run, windows) if len(windows) < 2 else self._pool.map(self._run, windows):
            assert done is None  # noqa: S101 — errors are raised here, by those who wait
        with self._lock:
            self._checked.update(job.first for job in jobs)

    def copy_ahead(self, unit: Unit, target: Tensor) -> bool:
        """Write the unit's bytes into `target` if all of them are there already, which they are not any more then."""
        places = [self._places.get(id(piece.tensor)) for piece in unit.pieces]
        if not all(place and self._are_there(place) for place in places):
            return False
        for view, place in zip(unit.views(target), places, strict=True):
            assert place  # noqa: S101
            memory, at = view.reshape(-1).view(torch.uint8), 0
            for packed, begin, end in place:
                memory[at : at + end - begin].copy_(self._brought.tensors[packed.name][begin:end])
                at += end - begin
        for name in {part.packed.name for place in places if place for part in place}:
            del self._brought.tensors[name]
        return True

    def point_ahead(self, unit: Unit, device: torch.device) -> bool:
        """See `AheadStore.point_ahead`. What is computed and not saved is copied there."""
        tensors = [piece.tensor for piece in unit.pieces]
        saved = {id(tensor): self._places[id(tensor)] for tensor in tensors if id(tensor) in self._places}
        if not saved or not all(self._are_there(p) and len(p) == 1 and p[0].is_whole for p in saved.values()):
            return False
        for tensor in tensors:
            if places := saved.get(id(tensor)):
                memory = self._brought.tensors[places[0].packed.name]
                tensor.data = memory.view(tensor.dtype).view(tensor.shape)
            else:
                tensor.data = self._computed[id(tensor)].to(device)
        for name in {places[0].packed.name for places in saved.values()}:
            del self._brought.tensors[name]
        return True

    def forget_ahead(self) -> None:
        """Give up the device's memory of what is there and was not asked for."""
        self._brought.tensors.clear()

    def buffer_ahead(self, unit: Unit) -> PinnedBuffer | None:
        """The unit's bytes in memory of their own, which is the caller's then; None if they are not there."""
        places = [self._places.get(id(piece.tensor), ()) for piece in unit.pieces]
        if not all(len(place) == 1 and place[0].is_whole for place in places):
            return None
        names = tuple(place[0].packed.name for place in places)
        units = self._brought.units
        buffer = units.get(names)
        return units.pop(names) if buffer and buffer.nbytes == unit.nbytes else None

    def _are_there(self, places: Sequence[_Slice]) -> bool:
        return all(place.packed.name in self._brought.tensors for place in places)

    def close(self) -> None:
        """Close the file and let others remove the pack."""
        self._coming = None
        self._brought.clear()
        self._pool.shutdown()
        self._file.close()
        self._opened.close()

    def _run(self, window: Sequence[_Job]) -> None:
        first = window[0].first
        try:
            data = self._file.read(first, max(job.first + job.length for job in window))
        except EOFError as error:
            raise self._damaged("the file ends early") from error
        except OSError as error:
            raise self._unreadable(error) from error
        for job in window:
            piece = data[job.first - first : job.first - first + job.length]
            if job.first not in self._checked and checksum(piece) != job.checksum:
                raise self._damaged(f"bytes {job.first} to {job.first + job.length} are not what was written")
            # Others run while numpy copies.
            np.copyto(np.frombuffer(job.target, np.uint8), np.frombuffer(piece[job.begin : job.end], np.uint8))

    def _damaged(self, why: str) -> DamagedPack:
        what = f"{self._name} are damaged: {why}"
        if self._give_up():
            self._opened.drop()
            _log.warning("%s; they were dropped, and the model's own files are read instead", what)
        return DamagedPack(what, hint="they were dropped: start again, and the model's own files are read")

    def _unreadable(self, error: OSError) -> DamagedPack:
        why = error.strerror or str(error)
        if isinstance(error, NOT_THERE):
            return self._damaged(why)
        what = f"{self._name} cannot be read: {why}"
        if self._give_up():
            self._opened.close()
            _log.warning("%s; the model's own files are read instead", what)
        return UnreadablePack(what, hint="check the disk and who may read it; --no-pack reads the model's own files")

    @property
    def _name(self) -> str:
        pack = self._opened.pack
        return f"the packed weights of {pack.component!r} ({pack.model}, {pack.storage.value})"

    def _give_up(self) -> bool:
        """Whether this reader is the first to do so."""
        with self._lock:
            first, self._given_up = not self._given_up, True
        return first


def load_packed(
    network: nn.Module,
    opened: OpenPack,
    planned: ComponentPlan,
    device: torch.device,
    joined: Joined | None = None,
    *,
    later: bool = False,
) -> tuple[nn.Module, Store | None]:
    """Give a network that was made without weights (parameters on `meta`) those of a pack, where the plan puts them.

    Weights that are streamed from pinned RAM or from the disk stay in the pack, and the store reads them; all others
    are read now, unless it is to be `later`.

    Raises:
        DamagedPack: the pack lacks a weight, or has one that is not what was written; it was dropped.
        UnreadablePack: it cannot be read now.
    """
    make_fitting(network, opened.pack.tensors, native=planned.native, joined=joined)
    network.eval().requires_grad_(requires_grad=False)
    streamed = planned.placement == Placement.STREAMED
    once = not (streamed and planned.waiting == Waiting.DISK)
    coming = None if later else partial(weights_ahead, opened.pack.key)
    store = PackStore(network, opened, joined, once=once, coming=coming)
    if later or (streamed and planned.waiting != Waiting.PAGEABLE):
        return network, store
    try:
        there = planned.placement == Placement.DEVICE
        fill(network, store, device if there else torch.device("cpu"))
    finally:
        store.close()
    return network, None


def make_fitting(network: nn.Module, tensors: Sequence[Packed], *, native: bool, joined: Joined | None = None) -> None:
    """Make the parameters empty tensors in RAM in the formats of the pack, and quantized layers of those with scales.

    Until their pages are touched they take no RAM.
    """
    forms = {packed.name: packed.format for packed in tensors}

    def form_of(name: str) -> str | None:
        return forms.get(_made_of(name, joined or {})[0].name)

    for name, module in list(network.named_modules()):
        form = form_of(f"{name}.weight")
        if isinstance(module, nn.Linear) and form and form_of(f"{name}.scale"):
            network.set_submodule(name, _quantized(module, form, native=native))
    empty: dict[int, nn.Parameter] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                form = form_of(f"{name}.{own}".removeprefix("."))
                made = torch.empty(parameter.shape, dtype=_dtype(form) if form else parameter.dtype)
                module.register_parameter(own, empty.setdefault(id(parameter), nn.Parameter(made, requires_grad=False)))


def fill(network: nn.Module, store: Store, device: torch.device, *, lane: Lane | None = None) -> None:
    """Read all weights of a network from the store into memory of the device, reading ahead while copies are under way.

    Raises:
        As `Store.read`.
    """
    whole = rest_of(network, ())
    if whole and isinstance(store, PackStore) and store.point_ahead(whole, device):
        return
    units = [part.unit for part in parts_of(whole)] if whole else []
    if device.type == "cpu" and lane is None:
        for unit, memory in in_order(store, units, _fresh, at_once=READ_AT_ONCE):
            unit.point_at(memory)
        return
    targets = [(unit, torch.empty(unit.nbytes, dtype=torch.uint8, device=device)) for unit in units]
    bring(store, targets, device, lane or lane_for(device))
    forget_ahead(store)
    for unit, memory in targets:
        unit.point_at(memory)


def _fresh(unit: Unit) -> Tensor:
    return torch.empty(unit.nbytes, dtype=torch.uint8)


def _quantized(linear: nn.Linear, form: str, *, native: bool) -> QuantizedLinear:
    weight = torch.empty(linear.weight.shape, dtype=_dtype(form))
    scale = torch.empty((linear.out_features, 1), dtype=torch.float32)
    return QuantizedLinear(weight, scale, linear.bias, native=native)


def _dtype(form: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, Precision(SAFETENSORS[form].precision).value)
    return dtype


def _made_of(name: str, joined: Joined) -> Sequence[Rows]:
    """What a tensor of the network is made of by names in the pack."""
    if name.endswith(".scale"):
        weights = _made_of(f"{name.removesuffix('scale')}weight", joined)
        return [rows._replace(name=f"{rows.name}{SCALE}") for rows in weights]
    return joined.get(name) or [Rows(plain_name(name), 0, _ALL)]


def _slices(name: str, tensor: Tensor, held: Mapping[str, Packed], joined: Joined) -> tuple[_Slice, ...]:
    """Where a tensor of the network lies; empty if it is not there as a whole, in its shape and format."""
    rows = _made_of(name, joined)
    found = [(held[part.name], part) for part in rows if part.name in held]
    sides = [
        packed.shape if part.stop == _ALL else (part.stop - part.start, *packed.shape[1:]) for packed, part in found
    ]
    shape = tuple(tensor.shape)
    fits = len(found) == len(rows) and all(_dtype(packed.format) == tensor.dtype for packed, _ in found)
    if len(found) == 1:
        fits = fits and sides[0] == shape
    else:
        fits = fits and sum(side[0] for side in sides) == shape[0] and all(side[1:] == shape[1:] for side in sides)
    return tuple(_slice(packed, part) for packed, part in found) if fits else ()


def _slice(packed: Packed, part: Rows) -> _Slice:
    if part.stop == _ALL:
        return _Slice(packed, 0, packed.nbytes)
    row_bytes = packed.nbytes // packed.shape[0]
    return _Slice(packed, part.start * row_bytes, part.stop * row_bytes)


def _jobs(places: Sequence[_Slice], view: Tensor) -> Iterator[_Job]:
    memory = memoryview(view.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    at = 0
    for place in places:
        for first, length, expected in pieces(place.packed):
            start = first - place.packed.offset
            begin, end = max(place.begin, start), min(place.end, start + length)
            if begin < end:
                yield _Job(first, length, expected, begin - start, end - start, memory[at : at + end - begin])
                at += end - begin
