"""Weight files of any format that is accepted, read by their headers: which tensor lies where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from autoflux.errors import DamagedCheckpoint, UnsupportedModel
from autoflux.models import gguf, weights
from autoflux.models.formats import FORMATS, SCALES
from autoflux.models.naming import decoder_levels, meaning_of
from autoflux.models.shapes import MLP_RATIO, Shape
from autoflux.models.values import Component, Naming
from autoflux.units import counted

_SCALES = (".scale_weight", ".weight_scale")
"""What ComfyUI and others put in the place of `.weight` for the factor that narrow numbers are multiplied by."""

_ASIDE = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8", "logit_scale", "position_ids", "spiece_model")
"""What files hold beside the weights and nothing needs."""


class Stowed(NamedTuple):
    """One tensor of a file: `offset` and `nbytes` are where its data lies in the file."""

    shape: Shape
    format: str
    offset: int
    nbytes: int


class Checkpoint(NamedTuple):
    """A weight file by its header."""

    file: Path
    tensors: dict[str, Stowed]
    metadata: dict[str, str]
    is_gguf: bool
    digest: str
    """Changes with the header and the size of the file."""


class Part(NamedTuple):
    """Where one weight of a network lies: the bytes of `ranges` (first, length) one after the other.

    `format` is safetensors' or GGUF's name. With a `scale`, of shape () or (rows, 1), the stored numbers are
    multiplied by it.
    """

    file: str
    ranges: tuple[tuple[int, int], ...]
    format: str
    shape: Shape
    scale: Part | None = None

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.ranges)


class Located(NamedTuple):
    """The weights of a component by diffusers' names, and what else stands under its prefix."""

    parts: dict[str, Part]
    others: tuple[str, ...]


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the header of a safetensors or GGUF file, whatever its name.

    Raises:
        DamagedCheckpoint: the file is empty, truncated, a web page, or says what cannot be.
        UnsafeCheckpoint: it is a pickle.
        UnsupportedModel: a GGUF of another version, or in a format that cannot be widened.
    """
    if _begins_like_gguf(file):
        header = gguf.read_gguf(file)
        tensors = {t.name: Stowed(t.shape, t.format, t.offset, t.nbytes) for t in header.tensors}
        metadata = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
        return Checkpoint(file, tensors, metadata, is_gguf=True, digest=_digest(file, header.nbytes))
    found = {tensor.name: tensor for tensor in weights.read_tensors(file)}
    ranges = weights.data_ranges(file)
    tensors = {name: Stowed(t.shape, t.precision, *ranges[name]) for name, t in found.items()}
    return Checkpoint(file, tensors, weights.read_metadata(file), is_gguf=False, digest=weights.header_digest(file))


def locate(component: Component) -> dict[str, Part]:
    """Where each weight of a component lies, by the names of diffusers and transformers.

    Raises:
        AutofluxError: a file has changed since the component was read, in any of the ways of `read_checkpoint`.
    """
    checkpoints = [read_checkpoint(Path(file)) for file in component.files]
    return find_parts(checkpoints, component.naming, component.prefix).parts


def find_parts(checkpoints: Iterable[Checkpoint], naming: Naming, prefix: str) -> Located:
    """Take apart what the files hold under `prefix`.

    Raises:
        DamagedCheckpoint: a tensor that is several weights in one cannot be cut into them.
        UnsupportedModel: scales of a kind that is not known.
    """
    held = {
        key.removeprefix(prefix): (str(checkpoint.file), stowed)
        for checkpoint in checkpoints
        for key, stowed in checkpoint.tensors.items()
        if key.startswith(prefix)
    }
    levels = decoder_levels(held)
    scales = {f"{key.removesuffix(end)}.weight": held[key] for key in held for end in _SCALES if key.endswith(end)}
    parts: dict[str, Part] = {}
    others: list[str] = []
    for key, (file, stowed) in held.items():
        if key.endswith((*_ASIDE, *_SCALES)):
            continue
        meaning = meaning_of(naming, key, levels)
        if meaning is None:
            others.append(key)
            continue
        cut = _Cut(key, file, stowed, scales.get(key), swapped=meaning.swapped)
        parts.update(cut.into(meaning.names))
    return Located(parts, tuple(others))


class _Cut:
    """Cuts a stored tensor into the weights that lie in it one above the other."""

    def __init__(self, key: str, file: str, stowed: Stowed, scale: tuple[str, Stowed] | None, *, swapped: bool) -> None:
        self._key, self._file, self._stowed, self._swapped = key, file, stowed, swapped
        self._scale = scale

    def into(self, names: tuple[str, ...]) -> Iterator[tuple[str, Part]]:
        if 0 in self._stowed.shape:
            raise DamagedCheckpoint(
                f"{self._file!r} cannot be loaded: {self._key!r} of shape {self._stowed.shape} holds no numbers",
                hint="download the file again",
            )
        shares = [MLP_RATIO if ".proj_mlp." in name and len(names) > 1 else 1 for name in names]
        rows = self._stowed.shape[0] if self._stowed.shape else 1
        if rows % (sum(shares) * (2 if self._swapped else 1)):
            raise DamagedCheckpoint(
                f"{self._file!r} cannot be loaded: {self._key!r} has {counted(rows, 'row')}, which are not "
                f"{counted(len(names), 'weight')}",
                hint="download the file again",
            )
        start = 0
        for name, share in zip(names, shares, strict=True):
            stop = start + rows // sum(shares) * share
            yield name, self._part(name, start, stop)
            start = stop

    def _part(self, name: str, start: int, stop: int) -> Part:
        shape = (stop - start, *self._stowed.shape[1:]) if self._stowed.shape else ()
        if ".attentions." in name and shape[2:] == (1, 1):
            shape = shape[:2]  # the original autoencoder has convolutions of one pixel for diffusers' linears
        ranges = self._ranges(self._stowed, start, stop)
        return Part(self._file, ranges, self._stowed.format, shape, self._scale_of(start, stop))

    def _scale_of(self, start: int, stop: int) -> Part | None:
        if self._scale is None:
            return None
        file, stowed = self._scale
        rows = self._stowed.shape[0] if self._stowed.shape else 1
        if stowed.shape in ((), (1,), (1, 1)):
            return Part(file, ((stowed.offset, stowed.nbytes),), stowed.format, ())
        if stowed.shape in ((rows,), (rows, 1)):
            return Part(file, self._ranges(stowed, start, stop), stowed.format, (stop - start, 1))
        raise UnsupportedModel(
            f"{file!r}: the scales of {self._key!r} have the shape {stowed.shape}; known are one for all and one a row",
            hint="use another version of the model",
        )

    def _ranges(self, stowed: Stowed, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        row = stowed.nbytes // (stowed.shape[0] if stowed.shape else 1)
        if not self._swapped:
            return ((stowed.offset + start * row, (stop - start) * row),)
        middle = (start + stop) // 2
        halves = ((middle, stop), (start, middle))
        return tuple((stowed.offset + first * row, (last - first) * row) for first, last in halves)


def check_formats(parts: Mapping[str, Part], name: str) -> None:
    """Refuse what cannot be widened.

    Raises:
        UnsupportedModel: a weight or its scale is stored in a format that is not known, or whole numbers have no scale.
    """
    for weight, part in parts.items():
        if part.format not in FORMATS:
            what = f"the weights of {name!r} are {part.format}; known are {', '.join(FORMATS)}"
        elif part.scale and part.scale.format not in SCALES:
            what = f"the scales of {name!r} are {part.scale.format}, of {weight!r}; known are {', '.join(SCALES)}"
        elif part.format == "I8" and not part.scale:
            what = f"the weights of {name!r} are I8 without scales, such as {weight!r}"
        else:
            continue
        raise UnsupportedModel(what, hint="use another version of the model")


def _begins_like_gguf(file: Path) -> bool:
    weights.check_regular(file)
    try:
        with file.open("rb") as opened:
            return opened.read(len(gguf.MAGIC)) == gguf.MAGIC
    except OSError as error:
        raise weights.unreadable(file, error) from error


def _digest(file: Path, header_bytes: int) -> str:
    with file.open("rb") as opened:
        header = opened.read(header_bytes)
    return hashlib.sha256(header + str(file.stat().st_size).encode()).hexdigest()
