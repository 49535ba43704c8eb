"""Cutting a module into what one copy moves: its weights laid out one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor, nn

from autoflux.errors import ContradictoryWishes
from autoflux.planning.schedule import aligned


@dataclass(frozen=True)
class Atom:
    """A module that runs once a pass, as a whole: the smallest thing that can be brought and released."""

    name: str
    module: nn.Module
    tied: tuple[nn.Module, ...] = ()
    """Modules with the same weights under another name, one of which may be called in its place."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.module, *self.tied)


@dataclass(frozen=True)
class Piece:
    """A parameter or buffer and its place in its unit."""

    tensor: Tensor
    offset: int

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True)
class Unit:
    """Consecutive atoms that are copied together."""

    atoms: tuple[Atom, ...]
    pieces: tuple[Piece, ...]
    nbytes: int

    @property
    def name(self) -> str:
        first, last = self.atoms[0].name, self.atoms[-1].name
        return first if first == last else f"{first} to {last}"

    def views(self, memory: Tensor) -> list[Tensor]:
        """The unit's tensors as views of `memory` (uint8, at least `nbytes`)."""
        return [
            memory[piece.offset : piece.offset + piece.nbytes].view(piece.tensor.dtype).view(piece.tensor.shape)
            for piece in self.pieces
        ]

    def write(self, memory: Tensor) -> None:
        """Copy the tensors, wherever they are, into `memory`."""
        for view, piece in zip(self.views(memory), self.pieces, strict=True):
            view.copy_(piece.tensor.data)

    def point_at(self, memory: Tensor) -> None:
        """Let the module's tensors be views of `memory`."""
        for view, piece in zip(self.views(memory), self.pieces, strict=True):
            piece.tensor.data = view


def block_atoms(module: nn.Module, paths: Iterable[str]) -> list[Atom]:
    """The blocks of the block lists at these attribute paths, in order."""
    return [
        Atom(f"{path}.{i}", block) for path in paths for i, block in enumerate(module.get_submodule(path).children())
    ]


def sequence_atoms(module: nn.Module) -> list[Atom]:
    """Cut a module that runs its children in the order in which they were registered: text encoders, decoders.

    Block lists are cut into their blocks; what stands before, between and after them are atoms of their own.
    """
    found: dict[tuple[int, ...], Atom] = {}
    for atom in _cut("", module):
        weights = tuple(map(id, _tensors(atom.module)))
        first = found.setdefault(weights, atom)
        if weights and atom.module not in first.modules:
            # T5's embedding hangs in two places.
            found[weights] = replace(first, tied=(*first.tied, atom.module))
    return list(found.values())


def _cut(name: str, module: nn.Module) -> Iterator[Atom]:
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}".removeprefix(".")
        if isinstance(module, nn.ModuleList) or not any(isinstance(m, nn.ModuleList) for m in child.modules()):
            yield Atom(full, child)
        else:
            yield from _cut(full, child)


def make_units(atoms: Sequence[Atom], block_bytes: int, *, alone: Collection[int] = ()) -> list[Unit]:
    """Join consecutive atoms as long as they stay within `block_bytes`; a larger atom is a unit by itself, and so is
    each of those numbered in `alone`.

    Raises:
        ContradictoryWishes: two atoms share a tensor, which can be in one place only.
    """
    units: list[list[Atom]] = []
    held = 0
    for i, atom in enumerate(atoms):
        size = sum(aligned(_nbytes(tensor)) for tensor in _tensors(atom.module))
        if size == 0:
            continue
        if units and held + size <= block_bytes and i not in alone:
            units[-1].append(atom)
            held += size
        else:
            units.append([atom])
            held = block_bytes if i in alone else size
    made = [_unit(members) for members in units]
    _check_apart(made)
    return made


def rest_of(module: nn.Module, units: Iterable[Unit]) -> Unit | None:
    """All tensors of the module outside the units, as a unit that is none of the stream's; None if there are none."""
    streamed = {id(piece.tensor) for unit in units for piece in unit.pieces}
    return _of_tensors((Atom("rest", module),), [t for t in _tensors(module) if id(t) not in streamed])


def staying_of(module: nn.Module, units: Sequence[Unit], resident: Collection[int]) -> list[Unit]:
    """What of a module is always there: the units with these numbers, and all that is in none."""
    rest = rest_of(module, units)
    return [units[i] for i in sorted(resident)] + ([rest] if rest else [])


def apart_from(others: Iterable[Unit], units: Iterable[Unit]) -> list[Unit]:
    """Those of the units that share no tensor with others."""
    taken = {id(piece.tensor) for unit in others for piece in unit.pieces}
    return [unit for unit in units if not any(id(piece.tensor) in taken for piece in unit.pieces)]


def _unit(atoms: Sequence[Atom]) -> Unit:
    tensors = {id(t): t for atom in atoms for t in _tensors(atom.module)}
    made = _of_tensors(tuple(atoms), list(tensors.values()))
    assert made is not None  # noqa: S101 — atoms without tensors were left out
    return made


def _of_tensors(atoms: tuple[Atom, ...], tensors: Sequence[Tensor]) -> Unit | None:
    pieces, offset = [], 0
    for tensor in tensors:
        pieces.append(Piece(tensor, offset))
        offset += aligned(_nbytes(tensor))
    return Unit(atoms, tuple(pieces), offset) if pieces else None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check_apart(units: Sequence[Unit]) -> None:
    seen: dict[int, Unit] = {}
    for unit in units:
        for piece in unit.pieces:
            other = seen.setdefault(id(piece.tensor), unit)
            if other is not unit:
                raise ContradictoryWishes(
                    f"{other.name!r} and {unit.name!r} share a weight, so they cannot be streamed apart",
                    hint="keep one of them on the device, or use a larger block size",
                )
