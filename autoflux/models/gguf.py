"""GGUF files read by their headers, without trusting a single length in them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` maps the file and follows its
lengths with numpy; this reads a bounded number of bytes and says which of them cannot be right.
"""

from __future__ import annotations

import struct
from io import SEEK_CUR
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

from autoflux.errors import DamagedCheckpoint, UnsupportedModel
from autoflux.models.formats import GGML, Format
from autoflux.models.weights import unreadable
from autoflux.units import counted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_LIMIT = 64 * 2**20
"""Largest header that is read; FLUX's takes 60 kB, a language model's with its vocabulary some MB."""

MOST_ENTRIES = 2**20
"""Tensors, and metadata that is read one by one; FLUX has 800, the largest vocabularies 256,000 words."""

_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


class GgufTensor(NamedTuple):
    """One tensor: `shape` in torch's order, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int


class GgufHeader(NamedTuple):
    """What stands before the data. Of `metadata` only strings and numbers are kept."""

    metadata: dict[str, str | int | float]
    tensors: tuple[GgufTensor, ...]
    nbytes: int


def read_gguf(file: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        DamagedCheckpoint: a length, offset or count in it cannot be right, or the file is truncated.
        UnsupportedModel: another version, or a format that cannot be widened.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            return _Reader(opened, size, file).header()
    except OSError as error:
        raise unreadable(file, error) from error


class _Reader:
    """Takes values from the front of a file and refuses to go past its end."""

    def __init__(self, opened: BinaryIO, size: int, file: Path) -> None:
        self._opened = opened
        self._limit = min(size, HEADER_LIMIT)
        self._size = size
        self._file = str(file)
        self._announced = 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise self._damage("it does not begin with GGUF")
        version = self._integer("<I")
        if version not in VERSIONS:
            raise UnsupportedModel(f"{self._file!r} is GGUF version {version}; known are 2 and 3")
        # A tensor's entry takes at least 24 bytes, a metadata entry 13.
        tensors, entries = self._listed(24), self._listed(13)
        metadata = dict(self._entry() for _ in range(entries))
        found = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self._damage(f"its alignment is {alignment!r}")
        start = -(-self._opened.tell() // alignment) * alignment
        placed = tuple(t._replace(offset=start + t.offset) for t in found)
        self._check(placed, alignment)
        return GgufHeader({k: v for k, v in metadata.items() if v is not None}, placed, start)

    def _entry(self) -> tuple[str, str | int | float | None]:
        return self._string(), self._value(self._integer("<I"))

    def _value(self, kind: int, depth: int = 0) -> str | int | float | None:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if depth > 1:
                raise self._damage("its metadata nests too deep")
            self._skip_array(self._integer("<I"), depth)
            return None
        if kind not in _SCALARS:
            raise self._damage(f"its metadata has a value of unknown kind {kind}")
        return self._number(_SCALARS[kind])

    def _skip_array(self, kind: int, depth: int) -> None:
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            self._opened.seek(self._count(size) * size, SEEK_CUR)
            return
        for _ in range(self._listed(8)):
            self._value(kind, depth + 1)

    def _tensor(self) -> GgufTensor:
        name, dimensions = self._string(), self._integer("<I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise self._damage(f"the tensor {name!r} has {dimensions} dimensions")
        # The last of torch's dimensions comes first.
        shape = tuple(self._integer("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._integer("<I"), self._integer("<Q")
        if kind not in GGML:
            raise UnsupportedModel(
                f"{self._file!r}: the tensor {name!r} has the GGUF format number {kind}, which cannot be widened",
                hint="use a file in one of " + ", ".join(label for label, _ in GGML.values()),
            )
        label, form = GGML[kind]
        return GgufTensor(name, shape, label, offset, self._nbytes(name, shape, form))

    def _nbytes(self, name: str, shape: tuple[int, ...], form: Format) -> int:
        if shape[-1] % form.block_items or not all(shape):
            raise self._damage(f"the tensor {name!r} of shape {shape} is not made of whole blocks")
        return prod(shape) // form.block_items * form.block_bytes

    def _check(self, tensors: tuple[GgufTensor, ...], alignment: int) -> None:
        """No tensor outside the file, none over another, nothing left at the end."""
        end = 0
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if tensor.offset % alignment:
                raise self._damage(f"the data of {tensor.name!r} is not aligned to {alignment} bytes")
            if tensor.offset < end:
                raise self._damage(f"the data of {tensor.name!r} overlaps another tensor's")
            end = tensor.offset + tensor.nbytes
            if end > self._size:
                raise self._damage(f"{tensor.name!r} would end at byte {end:,} and the file has {self._size:,}")
        if tensors and self._size - end >= alignment:
            raise self._damage(f"it goes on for {counted(self._size - end, 'byte')} after the last tensor")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self._damage("two tensors have the same name")

    def _string(self) -> str:
        raw = self._take(self._count(1))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._damage("a name in it is not UTF-8") from error

    def _listed(self, least_bytes: int) -> int:
        """A number of things that are read one by one."""
        count = self._count(least_bytes)
        self._announced += count
        if self._announced > MOST_ENTRIES:
            raise self._damage(f"it announces more than {MOST_ENTRIES:,} entries")
        return count

    def _count(self, least_bytes: int) -> int:
        """A number of things of at least so many bytes each that are still to come."""
        count = self._integer("<Q")
        left = self._limit - self._opened.tell()
        if count * least_bytes > left:
            raise self._damage(f"it announces more entries, {count:,}, than fit the rest, {counted(left, 'byte')}")
        return count

    def _integer(self, form: str) -> int:
        return int(self._number(form))

    def _number(self, form: str) -> int | float:
        value: int | float = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _take(self, count: int) -> bytes:
        if self._opened.tell() + count > self._limit:
            raise self._damage("it ends within its header")
        taken = self._opened.read(count)
        if len(taken) < count:
            raise self._damage("it ends within its header")
        return taken

    def _damage(self, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{self._file!r} cannot be read as GGUF: {what}", hint="download the file again")
