"""Packs: the weights of one component, written once in the order and format they are used in; as values, without torch.

A pack is a folder `packs/KEY` in the cache with the weights in one safetensors file, which any tool can read, and an
index with the checksums. Each component has its own, so that models with the same text encoders share theirs, and
those of all precisions of a transformer share the rest. Names are those of diffusers and transformers: whichever
library computes, it cuts or joins them as it would those of the model.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from autoflux.errors import DamagedFile, DamagedPack, UnreadablePack
from autoflux.models.checkpoints import Part, locate, read_checkpoint
from autoflux.models.formats import SAFETENSORS
from autoflux.models.shapes import Shape
from autoflux.models.values import Component, Model, Precision
from autoflux.values import Value

PACK_SCHEMA = 2
"""Version of the files, part of every key. Raised when an older version must not be used any more."""

WEIGHTS = "weights.safetensors"
INDEX = "pack.json"

PIECE_BYTES = 16 * 2**20
"""What one checksum is for. Pieces are read and checked side by side, and one that is still in the processor's cache
costs less to check."""

PAGE_BYTES = 4096
"""The data begins at a multiple of it, as mapping a file wants."""

SIZE_MULTIPLE = 16
"""Matrices with other sizes stay wide, as in `quantized.SIZE_MULTIPLE`."""

NARROW_FORMATS = {Precision.FLOAT8: "F8_E4M3", Precision.INT8: "I8"}
WIDE_FORMATS = {Precision.FLOAT32: "F32", Precision.FLOAT16: "F16", Precision.BFLOAT16: "BF16"}
SCALE = "_scale"
"""What the name of a narrow weight's scales ends in after its own: `x.weight_scale`, as others write it too."""

FLOAT32_IN_FLOAT16 = {"T5EncoderModel": "wo"}
"""Layers that transformers keeps in float32 when the rest is float16, which they overflow (`_keep_in_fp32_modules`)."""

KEY_DIGITS = 24
"""Hexadecimal."""

NOT_THERE = (FileNotFoundError, NotADirectoryError)
"""Of the system's errors those that say so. Others say nothing of what a file holds: it may not be read, its disk is
away, or too many files are open."""

_SHA256 = re.compile("[0-9a-f]{64}")


class Packed(Value, frozen=True, kw_only=True):
    """One tensor of a pack: where its data lies in the file, and an XXH3 of 64 bits for each `PIECE_BYTES` of it."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksums: tuple[int, ...] = ()


class Pack(Value, frozen=True, kw_only=True):
    """The index of a pack. `model` is what it was made for; others with the same source files share it."""

    schema: int = PACK_SCHEMA
    key: str
    component: str
    storage: Precision
    arithmetic: Precision
    model: str
    model_path: str
    base_path: str = ""
    """Of the model that had the parts which the file at `model_path` lacks; "" if that has all."""
    sources: tuple[str, ...]
    nbytes: int
    """Of the file with the weights."""
    tensors: tuple[Packed, ...]

    def is_from(self, place: Path) -> bool:
        """Whether it was made from files in this folder, or from this file."""
        real = _resolved(place)
        files = map(Path, self.sources)
        return any(file.is_relative_to(place) or _resolved(file).is_relative_to(real) for file in files)


class Recipe(NamedTuple):
    """What a pack is made of: the matrices of a transformer's blocks in `storage`, everything else in `arithmetic`."""

    component: Component
    storage: Precision
    arithmetic: Precision

    @property
    def narrow(self) -> bool:
        """Whether there are weights in 8 bits."""
        return self.storage in NARROW_FORMATS

    def key(self) -> str:
        """The name of its pack: another one as soon as a source file is another one.

        Files whose names in a hub's cache are their SHA-256 are known by it, others by header, size and the time of
        their last change.

        Raises:
            AutofluxError: a source file cannot be read any more.
        """
        part = self.component
        told = [PACK_SCHEMA, part.name, part.class_name, part.naming, part.prefix, self.storage, self.arithmetic]
        stamps = [_stamp(Path(file)) for file in part.files]
        return hashlib.sha256(msgspec.json.encode([told, stamps])).hexdigest()[:KEY_DIGITS]

    def nbytes(self) -> int:
        """Of the file with its pack's weights. Raises as `lay_out`."""
        last = lay_out(self)[-1].packed
        return last.offset + last.nbytes


class Item(NamedTuple):
    """A tensor that a pack will have: a weight, or the scales of the one before it."""

    packed: Packed
    source: Part
    is_scale: bool


def recipes(model: Model, storage: Precision, arithmetic: Precision) -> list[Recipe]:
    """What packing a model takes: the transformer in `storage`, the others in `arithmetic`."""
    return [
        Recipe(part, storage if part.name == "transformer" else arithmetic, arithmetic) for part in model.components
    ]


def lay_out(recipe: Recipe) -> list[Item]:
    """Every tensor of a pack in the order of the file, without checksums; offsets count from the file's beginning.

    What lies outside the blocks comes first, then the blocks in the order they run; in a block first what is taken out
    of the loop, the modulation. A narrow weight follows its scales.

    Raises:
        AutofluxError: a source file has changed in a way that `locate` refuses.
    """
    parts = locate(recipe.component)
    names = sorted(parts, key=lambda name: _rank(recipe.component, name))
    unplaced = [item for name in names for item in _items(recipe, name, parts[name])]
    begin = len(header([item.packed for item in unplaced]))
    placed = []
    for item in unplaced:
        placed.append(item._replace(packed=item.packed.replace(offset=begin)))
        begin += item.packed.nbytes
    return placed


def header(tensors: list[Packed]) -> bytes:
    """The header of the safetensors file: everything before the data, padded to whole pages."""
    described, at = {}, 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        described[tensor.name] = {"dtype": tensor.format, "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.nbytes
    text = msgspec.json.encode(described)
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def pieces(tensor: Packed) -> Iterator[tuple[int, int, int]]:
    """First byte in the file, length and checksum of each piece of a tensor."""
    for number, checksum in enumerate(tensor.checksums):
        first = number * PIECE_BYTES
        yield tensor.offset + first, min(PIECE_BYTES, tensor.nbytes - first), checksum


def read_index(folder: Path) -> Pack:
    """The index of the pack in a folder.

    Raises:
        DamagedPack: there is none, or it is not of this version, this key, or these files.
        UnreadablePack: it cannot be read now.
    """
    pack = parse_index(folder)
    if pack.schema != PACK_SCHEMA:
        raise DamagedPack(f"the pack {str(folder)!r} is of version {pack.schema}, and this is {PACK_SCHEMA}")
    try:
        found = (folder / WEIGHTS).stat().st_size
    except OSError as error:
        raise _unreadable(folder, error) from error
    if found != pack.nbytes:
        raise DamagedPack(f"the pack {str(folder)!r} has {found:,} bytes of {pack.nbytes:,}")
    if pack.key != folder.name or not all(map(_can_be, pack.tensors)) or not _lies_as_told(folder, pack):
        raise DamagedPack(f"the pack {str(folder)!r} is not what its index says")
    return pack


def parse_index(folder: Path) -> Pack:
    """What the index in a folder says, right or wrong.

    Raises:
        DamagedPack: there is none, or it is no index.
        UnreadablePack: it cannot be read now.
    """
    try:
        pack = Pack.from_json((folder / INDEX).read_bytes(), origin="its index")
    except (OSError, DamagedFile) as error:
        raise _unreadable(folder, error) from error
    if any("\0" in place for place in (pack.model_path, pack.base_path, *pack.sources)):
        raise DamagedPack(f"the pack {str(folder)!r} is of files that cannot be, by its index")
    return pack


def check_pack(folder: Path, checksum: Callable[[bytes], int], on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Read a whole pack again; says which tensor is not what was written, "" if all are.

    Raises:
        DamagedPack: its index or file is not there, or cannot be right.
        UnreadablePack: they cannot be read now.
    """
    pack = read_index(folder)
    try:
        with (folder / WEIGHTS).open("rb") as file:
            for tensor in pack.tensors:
                for first, length, expected in pieces(tensor):
                    file.seek(first)
                    if checksum(file.read(length)) != expected:
                        return repr(tensor.name)
                    on_bytes(length)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return ""


def _resolved(path: Path) -> Path:
    """Without links; also where they lead in a circle, of which `Path.resolve` makes an error until Python 3.13."""
    return Path(os.path.realpath(path))


def _can_be(tensor: Packed) -> bool:
    """Whether what is said of a tensor agrees with itself."""
    form = SAFETENSORS.get(tensor.format)
    if form is None or tensor.nbytes != math.prod(tensor.shape) * form.block_bytes:
        return False
    return len(tensor.checksums) == -(-tensor.nbytes // PIECE_BYTES)


def _lies_as_told(folder: Path, pack: Pack) -> bool:
    """Whether the file has the tensors of the index, in these formats and shapes and at these places, by its header."""
    head = header(list(pack.tensors))
    ends = list(itertools.accumulate((tensor.nbytes for tensor in pack.tensors), initial=len(head)))
    if [*(tensor.offset for tensor in pack.tensors), pack.nbytes] != ends:
        return False
    try:
        with (folder / WEIGHTS).open("rb") as file:
            return file.read(len(head)) == head
    except NOT_THERE as error:
        raise _unreadable(folder, error) from error
    except OSError:
        return True  # whoever reads the weights says that they cannot be read now


def _unreadable(folder: Path, error: OSError | DamagedFile) -> DamagedPack:
    kind = DamagedPack if isinstance(error, (DamagedFile, *NOT_THERE)) else UnreadablePack
    return kind(f"the pack {str(folder)!r} cannot be read: {getattr(error, 'strerror', None) or error}")


def _stamp(file: Path) -> list[str | int]:
    target = file.resolve()
    try:
        found = target.stat()
    except OSError:
        read_checkpoint(file)  # says by name what is wrong with it
        raise
    digest = _digest(file, found.st_ino, found.st_size, found.st_mtime_ns)
    return [digest, target.name if _SHA256.fullmatch(target.name) else found.st_mtime_ns]


@functools.lru_cache(maxsize=256)
def _digest(file: Path, *_as_it_was: int) -> str:
    """Of the header; a start asks for it three times."""
    return read_checkpoint(file).digest


def _rank(component: Component, name: str) -> tuple[object, ...]:
    """Where a weight comes in the file."""
    block_list = next((i for i, blocks in enumerate(component.block_lists) if name.startswith(f"{blocks.path}.")), -1)
    # Numbers by value, and words after numbers.
    words = [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in name.split(".")]
    if block_list < 0:
        return (-1, words)
    depth = component.block_lists[block_list].path.count(".") + 1
    return (block_list, words[depth], not is_modulation(name), words)


def is_modulation(name: str) -> bool:
    """Whether a tensor of a block is of what can be computed for all steps beforehand."""
    return re.search(r"\.norm\w*\.linear\.", name) is not None


def _items(recipe: Recipe, name: str, source: Part) -> list[Item]:
    if not _is_narrowed(recipe, name, source.shape):
        return [_item(name, _wide_format(recipe, name), source.shape, source)]
    return [
        _item(f"{name}{SCALE}", "F32", (source.shape[0], 1), source, is_scale=True),
        _item(name, NARROW_FORMATS[recipe.storage], source.shape, source),
    ]


def _is_narrowed(recipe: Recipe, name: str, shape: Shape) -> bool:
    """Whether it is the matrix of a layer that loading would quantize, see `streaming.stays_wide`."""
    if not recipe.narrow or len(shape) != 2 or any(side % SIZE_MULTIPLE for side in shape):
        return False
    path = next((b.path for b in recipe.component.block_lists if name.startswith(f"{b.path}.")), None)
    if path is None or not name.endswith(".weight"):
        return False
    return "norm" not in name.removeprefix(f"{path}.").partition(".")[2].removesuffix(".weight")


def _wide_format(recipe: Recipe, name: str) -> str:
    careful = FLOAT32_IN_FLOAT16.get(recipe.component.class_name)
    if recipe.arithmetic == Precision.FLOAT16 and careful in name.split("."):
        return "F32"
    return WIDE_FORMATS[recipe.arithmetic]


def _item(name: str, form: str, shape: Shape, source: Part, *, is_scale: bool = False) -> Item:
    nbytes = math.prod(shape) * SAFETENSORS[form].block_bytes
    packed = Packed(name=name, format=form, shape=tuple(shape), offset=0, nbytes=nbytes)
    return Item(packed, source, is_scale)
