"""Weights read from where they lie in files of any layout: cut out of larger tensors, scaled, or in GGUF's formats."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from autoflux.errors import DamagedCheckpoint
from autoflux.models.checkpoints import Part
from autoflux.models.formats import FORMATS, QUANTIZED
from autoflux.models.naming import plain_name
from autoflux.runtime.stores import make_empty
from autoflux.runtime.units import Unit


class PartReader:
    """Reads parts of files, which stay open, so that one that is replaced meanwhile is still read to its end."""

    def __init__(self, files: Iterable[str]) -> None:
        """Raises DamagedCheckpoint if a file cannot be opened."""
        self._lock = threading.Lock()
        self._files: dict[str, BinaryIO] = {}
        for file in dict.fromkeys(files):
            try:
                self._files[file] = Path(file).open("rb")  # noqa: SIM115 — closed by `close`
            except OSError as error:
                self.close()
                raise DamagedCheckpoint(f"{file!r} cannot be read: {error.strerror}") from error

    def read(self, part: Part, target: Tensor) -> None:
        """Write the weight into `target`, of its shape, converted to its format.

        Raises:
            DamagedCheckpoint: the file ended early or cannot be read any more.
        """
        stored = FORMATS[part.format]
        dtype = getattr(torch, stored.precision.value)
        if part.scale is None and dtype == target.dtype and part.format not in QUANTIZED and target.is_contiguous():
            self._fill(part, target.view(-1).view(torch.uint8))
            return
        target.copy_(self._wide(part, dtype))

    def _wide(self, part: Part, dtype: torch.dtype) -> Tensor:
        """The weight, as stored if it needs no arithmetic, and otherwise in float32."""
        raw = torch.empty(part.nbytes, dtype=torch.uint8)
        self._fill(part, raw)
        if part.format in QUANTIZED:
            return _dequantized(raw, part)
        numbers = raw.view(dtype).view(part.shape)
        if part.scale is None:
            return numbers
        scale = torch.empty(part.scale.shape, dtype=torch.float32)
        self.read(part.scale, scale)
        return numbers.float() * scale.view(scale.shape[:1] + (1,) * (numbers.dim() - 1) if scale.dim() else ())

    def _fill(self, part: Part, target: Tensor) -> None:
        memory = memoryview(target.numpy())  # type: ignore[arg-type]
        done = 0
        try:
            for first, length in part.ranges:
                self._read_at(part.file, memory[done : done + length], first)
                done += length
        except OSError as error:
            raise DamagedCheckpoint(f"{part.file!r} cannot be read: {error.strerror}") from error

    def _read_at(self, file: str, memory: memoryview, offset: int) -> None:
        with self._lock:
            opened = self._files[file]
            opened.seek(offset)
            if opened.readinto(memory) < len(memory):  # type: ignore[attr-defined]
                raise DamagedCheckpoint(f"{file!r} ended early", hint="it was changed while in use; start again")

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()


class PartStore:
    """The bytes of units, read from parts when they are asked for. See `Store`."""

    def __init__(self, network: nn.Module, parts: Mapping[str, Part]) -> None:
        """`parts` has every weight of the network, by its name there.

        Raises:
            DamagedCheckpoint: one is missing or has another shape, or a file cannot be opened.
        """
        self._parts = dict(_matched(network, parts))
        # Buffers that are computed and not saved, as they are before anything is re-pointed.
        self._computed = {id(t): t.data for t in network.buffers() if id(t) not in self._parts}
        self._reader = PartReader(file for part in self._parts.values() for file in files_of(part))

    def read(self, unit: Unit, target: Tensor) -> None:
        """See `Store.read`; raises as `PartReader.read`."""
        for view, piece in zip(unit.views(target), unit.pieces, strict=True):
            part = self._parts.get(id(piece.tensor))
            if part is None:
                view.copy_(self._computed[id(piece.tensor)])
            else:
                self._reader.read(part, view)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def leave_parts_on_disk(network: nn.Module, parts: Mapping[str, Part], dtype: torch.dtype) -> PartStore:
    """Give a network that was made without weights (parameters on `meta`) a store that reads them from the parts.

    Raises:
        DamagedCheckpoint: as `PartStore`.
    """
    make_empty(network, dtype)
    return PartStore(network, parts)


def load_parts(
    network: nn.Module, parts: Mapping[str, Part], dtype: torch.dtype, *, float32: Collection[str] = ()
) -> None:
    """Fill a network that was made without weights (parameters on `meta`).

    Parameters with one of the words of `float32` in their path have that format, all others `dtype`.

    Raises:
        DamagedCheckpoint: as `PartStore` and `PartReader.read`.
    """
    make_empty(network, dtype)
    for name, parameter in network.named_parameters():
        if not set(float32).isdisjoint(name.split(".")):
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)
    wanted = dict(_matched(network, parts))
    reader = PartReader(file for part in wanted.values() for file in files_of(part))
    try:
        for tensor in {id(t): t for t in network.state_dict(keep_vars=True).values()}.values():
            reader.read(wanted[id(tensor)], tensor.data)
    finally:
        reader.close()


def _matched(network: nn.Module, parts: Mapping[str, Part]) -> Iterable[tuple[int, Part]]:
    for name, tensor in network.state_dict(keep_vars=True).items():
        part = parts.get(plain_name(name))
        if part is None or part.shape != tuple(tensor.shape):
            raise DamagedCheckpoint(
                f"the weight {name!r} of shape {tuple(tensor.shape)} is missing", hint="download the model again"
            )
        yield id(tensor), part


def files_of(part: Part) -> tuple[str, ...]:
    """The files that reading a part needs."""
    return (part.file, part.scale.file) if part.scale else (part.file,)


def _dequantized(raw: Tensor, part: Part) -> Tensor:
    """GGUF's blocks as float32, by diffusers' own arithmetic."""
    import gguf  # noqa: PLC0415 — only GGUF needs it
    from diffusers.quantizers.gguf.utils import dequantize_functions  # noqa: PLC0415

    form = FORMATS[part.format]
    blocks = raw.view(-1, form.block_bytes)
    widen = dequantize_functions[gguf.GGMLQuantizationType(QUANTIZED[part.format])]
    wide: Tensor = widen(blocks, form.block_items, form.block_bytes, dtype=torch.float32)
    return wide.reshape(part.shape)
