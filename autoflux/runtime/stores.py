"""Where a unit's bytes come from: the module itself, or the files it would have been loaded from."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from autoflux.errors import DamagedCheckpoint
from autoflux.models.weights import data_ranges, files_of, read_tensors, weight_shapes
from autoflux.runtime.pinned import PinnedBuffer
from autoflux.runtime.units import Piece, Unit

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Store(Protocol):
    """Gives the bytes of units in any order."""

    def read(self, unit: Unit, target: Tensor) -> None:
        """Write the unit's bytes into `target` (uint8, at least its size)."""

    def close(self) -> None:
        """Nothing is read any more."""


@runtime_checkable
class AheadStore(Protocol):
    """A store some of whose bytes may be on the device, or in pinned memory, already."""

    def point_ahead(self, unit: Unit, device: torch.device) -> bool:
        """Let the unit's tensors be what is on the device, if all of them are, each in one piece; says whether they
        were."""

    def copy_ahead(self, unit: Unit, target: Tensor) -> bool:
        """Write the unit's bytes into `target`, on the device, if all of them are; says whether they were."""

    def forget_ahead(self) -> None:
        """Give up the device's memory of what is there and was not asked for."""

    def buffer_ahead(self, unit: Unit) -> PinnedBuffer | None:
        """The unit's bytes in memory of their own, which is the caller's then; None if they are not there."""


class ModuleStore:
    """The module's own tensors, as long as they are not re-pointed."""

    def read(self, unit: Unit, target: Tensor) -> None:
        unit.write(target)

    def close(self) -> None:
        """Nothing to close."""


class KeptStore:
    """The tensors as they were when the store was made: RAM that is not pinned."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._kept = {id(piece.tensor): piece.tensor.data for unit in units for piece in unit.pieces}

    def read(self, unit: Unit, target: Tensor) -> None:
        for view, piece in zip(unit.views(target), unit.pieces, strict=True):
            # Tensors outside these units are read before they are re-pointed.
            view.copy_(self._kept.get(id(piece.tensor), piece.tensor.data))

    def close(self) -> None:
        """Let go of them."""
        self._kept.clear()


@dataclass(frozen=True)
class _Range:
    file: int
    offset: int
    nbytes: int
    dtype: torch.dtype


def _contents(number: int, file: Path) -> Iterator[tuple[tuple[str, tuple[int, ...]], _Range]]:
    """Every tensor of a file by name and shape."""
    tensors = list(read_tensors(file))
    ranges = data_ranges(file)
    for tensor in tensors:
        if dtype := _DTYPES.get(tensor.precision):
            yield (tensor.name, tensor.shape), _Range(number, *ranges[tensor.name], dtype)


class Rows(NamedTuple):
    """Rows `start` to `stop`, along the first dimension, of the tensor `name` in the files."""

    name: str
    start: int
    stop: int


class FileStore:
    """Tensors read from safetensors files when they are asked for.

    The module needs no weights of its own: made with empty tensors (`to_empty`), whose pages are never touched,
    it takes no RAM. Files are read, not mapped: one that is truncated meanwhile is an error and not the end of the
    process.
    """

    def __init__(
        self,
        module: nn.Module,
        files: Sequence[Path],
        renamed: Mapping[str, str] | None = None,
        *,
        joined: Mapping[str, Sequence[Rows]] | None = None,
    ) -> None:
        """`renamed` maps names in the module to names in the files where they differ. `joined` maps names of tensors
        in the module that the files hold in several to what they are put together of, in order.

        Raises:
            DamagedCheckpoint: a file cannot be read, or lacks a tensor of the module or has it in another shape
                or a format that torch lacks.
        """
        held = {key: place for i, file in enumerate(files) for key, place in _contents(i, file)}
        rows = {name: (sides, place) for (name, sides), place in held.items()} if joined else {}
        persistent = module.state_dict(keep_vars=True)
        self._ranges: dict[int, tuple[_Range, ...]] = {}
        for name, tensor in persistent.items():
            shape = tuple(tensor.shape)
            if joined and name in joined:
                if places := _joined(shape, joined[name], rows):
                    self._ranges[id(tensor)] = places
            elif place := held.get(((renamed or {}).get(name, name), shape)):
                self._ranges[id(tensor)] = (place,)
        for name, tensor in persistent.items():
            # One of several names of a tied weight is enough.
            if id(tensor) not in self._ranges:
                raise DamagedCheckpoint(
                    f"{str(files[0].parent)!r} lacks the weight {name!r} of shape {tuple(tensor.shape)}",
                    hint="download the model again",
                )
        # Buffers that are computed and not saved, as they are before anything is re-pointed.
        self._computed = {id(t): t.data for t in module.buffers() if id(t) not in self._ranges}
        self._lock = threading.Lock()
        self._files = [(str(file), os.open(file, os.O_RDONLY)) for file in files]

    def read(self, unit: Unit, target: Tensor) -> None:
        """See `Store.read`.

        Raises:
            DamagedCheckpoint: the file ended early or cannot be read any more.
        """
        for view, piece in zip(unit.views(target), unit.pieces, strict=True):
            self._read(piece, view)

    def fill(self, module: nn.Module) -> None:
        """Read all weights of the module, which the store was made for, into their own memory.

        Raises:
            DamagedCheckpoint: as `read`.
        """
        for tensor in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values():
            self._read(Piece(tensor, 0), tensor.data)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop()[1])

    def _read(self, piece: Piece, view: Tensor) -> None:
        places = self._ranges.get(id(piece.tensor))
        if places is None:
            view.copy_(self._computed[id(piece.tensor)])
            return
        numbers, at = view.flatten(), 0
        for place in places:
            count = place.nbytes // place.dtype.itemsize
            self._read_range(place, numbers[at : at + count])
            at += count

    def _read_range(self, place: _Range, numbers: Tensor) -> None:
        if place.dtype == numbers.dtype:
            self._fill(place, numbers.view(torch.uint8))
        else:
            wide = torch.empty(numbers.shape, dtype=place.dtype)
            self._fill(place, wide.view(torch.uint8))
            numbers.copy_(wide)

    def _fill(self, place: _Range, target: Tensor) -> None:
        name, descriptor = self._files[place.file]
        memory = memoryview(target.numpy())  # type: ignore[arg-type]
        done = 0
        try:
            while done < place.nbytes:
                count = self._read_at(descriptor, memory[done:], place.offset + done)
                if count == 0:
                    raise DamagedCheckpoint(f"{name!r} ended early", hint="it was changed while in use; start again")
                done += count
        except OSError as error:
            raise DamagedCheckpoint(f"{name!r} cannot be read: {error.strerror}") from error

    def _read_at(self, descriptor: int, memory: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [memory], offset)
        with self._lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(memory))
        memory[: len(data)] = data
        return len(data)


def _joined(
    shape: tuple[int, ...], parts: Sequence[Rows], held: Mapping[str, tuple[tuple[int, ...], _Range]]
) -> tuple[_Range, ...]:
    """Where the bytes of these rows lie; empty if some are missing, or if they do not make a tensor of that shape."""
    places = []
    for part in parts:
        sides, place = held.get(part.name, ((), None))
        if place is None or sides[1:] != shape[1:] or part.stop > sides[0]:
            return ()
        row_bytes = place.nbytes // sides[0]
        begin, nbytes = place.offset + part.start * row_bytes, (part.stop - part.start) * row_bytes
        places.append(replace(place, offset=begin, nbytes=nbytes))
    return tuple(places) if sum(part.stop - part.start for part in parts) == shape[0] else ()


def read_tensors_of(store: Store, tensors: Iterable[Tensor]) -> None:
    """Give each of the tensors its bytes from the store, in memory of its own, so that each can be freed by itself."""
    for tensor in tensors:
        piece = Piece(tensor, 0)
        unit = Unit((), (piece,), piece.nbytes)
        memory = torch.empty(piece.nbytes, dtype=torch.uint8)
        store.read(unit, memory)
        unit.point_at(memory)


def make_empty(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make the parameters empty tensors in RAM, of `dtype` or each of its own. Until their pages are touched they take
    none."""
    empty: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
            module.register_parameter(name, empty.setdefault(id(parameter), nn.Parameter(made, requires_grad=False)))


def leave_on_disk(
    network: nn.Module, place: Path, dtype: torch.dtype, *, joined: Mapping[str, Sequence[Rows]] | None = None
) -> FileStore:
    """Give a network that was made without weights (parameters on `meta`) a store that reads them from `place`, the
    folder of a component or one file. `joined` is as for `FileStore`.

    The parameters become empty tensors of `dtype` in RAM whose pages are never touched, so they take none.

    Raises:
        DamagedCheckpoint: a file cannot be read, or lacks a weight of the network.
    """
    make_empty(network, dtype)
    names = weight_shapes(place)
    # transformers 5 and earlier versions do not agree on whether CLIP's names have this prefix.
    spellings = {name: (f"{_CLIP}{name}", name.removeprefix(_CLIP)) for name in network.state_dict()}
    renamed = {
        name: other for name, others in spellings.items() if name not in names for other in others if other in names
    }
    return FileStore(network, files_of(place), renamed, joined=joined)


_CLIP = "text_model."
