"""Making packs: weights read from files of any layout, narrowed, and written in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from autoflux.errors import DamagedCheckpoint
from autoflux.files import flush
from autoflux.models.checkpoints import Part
from autoflux.models.formats import FORMATS
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import INDEX, PIECE_BYTES, WEIGHTS, Item, Pack, Packed, Recipe, header, lay_out
from autoflux.models.values import Model
from autoflux.runtime.pack_file import checksum
from autoflux.runtime.parts import PartReader, files_of
from autoflux.runtime.quantized import quantize

OnBytes = Callable[[int, int], None]
"""Called with the bytes of a pack that were written since the last call, and those of the whole pack."""


def pack_component(
    recipe: Recipe, model: Model, shelf: Shelf, *, on_bytes: OnBytes | None = None, device: torch.device | None = None
) -> Pack:
    """Write the pack of a recipe, unless it is there; needs RAM for one weight at a time.

    `device` is where to compute the narrow numbers, the CPU if not given; they are the same everywhere.

    Raises:
        AutofluxError: a source file has changed or cannot be read.
        DiskFull: no room on the disk, or within the limit; nothing is left behind.
        OutputUnwritable: the cache cannot be written; nothing is left behind.
    """
    key = recipe.key()
    items = lay_out(recipe)
    head = header([item.packed for item in items])
    nbytes = len(head) + sum(item.packed.nbytes for item in items)
    with shelf.making(key, nbytes) as folder:
        if folder:
            tensors = _write(
                folder / WEIGHTS,
                head,
                items,
                recipe,
                lambda count: on_bytes(count, nbytes) if on_bytes else None,
                device,
            )
            made = _index(recipe, model, key, nbytes, tensors)
            (folder / INDEX).write_text(made.to_json())
            flush(folder / INDEX)
            # What was read while a file was being replaced is of neither.
            _check_same(recipe, key)
    found = shelf.find(key)
    assert found is not None, "it was just made"  # noqa: S101
    return found


def _check_same(recipe: Recipe, key: str) -> None:
    if recipe.key() != key:
        raise DamagedCheckpoint(
            f"the weights of {recipe.component.name!r} were changed while they were packed", hint="start again"
        )


def _index(recipe: Recipe, model: Model, key: str, nbytes: int, tensors: Sequence[Packed]) -> Pack:
    return Pack(
        key=key,
        component=recipe.component.name,
        storage=recipe.storage,
        arithmetic=recipe.arithmetic,
        model=model.name,
        model_path=model.path,
        base_path=model.base_path,
        sources=recipe.component.files,
        nbytes=nbytes,
        tensors=tuple(tensors),
    )


def _write(
    file: Path,
    head: bytes,
    items: Sequence[Item],
    recipe: Recipe,
    on_bytes: Callable[[int], None],
    device: torch.device | None,
) -> list[Packed]:
    """Write the weights into a file of full size; gives their places with checksums."""
    reader = PartReader(name for item in items for name in files_of(item.source))
    written = []
    try:
        with file.open("r+b") as opened:
            opened.write(head)
            for packed, tensor in _tensors(items, recipe, reader, device):
                written.append(packed.replace(checksums=_write_pieces(opened, tensor, on_bytes)))
        flush(file)
    finally:
        reader.close()
    return written


def _tensors(
    items: Sequence[Item], recipe: Recipe, reader: PartReader, device: torch.device | None
) -> Iterator[tuple[Packed, Tensor]]:
    """What each item of the pack holds, in order."""
    narrow: Tensor | None = None
    for item in items:
        if item.is_scale:
            wide = _read(reader, item.source, getattr(torch, recipe.arithmetic.value))
            narrow, scale = quantize(wide, recipe.storage, device=device)
            yield item.packed, scale
        elif narrow is not None:
            yield item.packed, narrow
            narrow = None
        else:
            yield item.packed, _read(reader, item.source, getattr(torch, FORMATS[item.packed.format].precision.value))


def _read(reader: PartReader, source: Part, dtype: torch.dtype) -> Tensor:
    wide = torch.empty(source.shape, dtype=dtype)
    reader.read(source, wide)
    return wide


def _write_pieces(file: BinaryIO, tensor: Tensor, on_bytes: Callable[[int], None]) -> tuple[int, ...]:
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    checksums = []
    for first in range(0, len(data), PIECE_BYTES):
        piece = data[first : first + PIECE_BYTES]
        checksums.append(checksum(piece))
        file.write(piece)
        on_bytes(len(piece))
    return tuple(checksums)
