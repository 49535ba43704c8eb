"""Weight files read by their headers: names, shapes and number formats of tensors, no data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from autoflux.errors import DamagedCheckpoint, ModelNotFound, UnsafeCheckpoint
from autoflux.files import is_there
from autoflux.units import counted

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

HEADER_LIMIT = 100_000_000
"""Largest header that safetensors takes."""

_DISGUISES = (
    (b"\x80", "a pickle file, which can run code when it is loaded"),
    (b"PK\x03\x04", "a zip or torch pickle file, which can run code when it is loaded"),
)
_MISTAKES = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "run `git lfs pull` in the model's repository"),
    (b"<", "a web page, not weights", "download the file again; the site may have asked for a login"),
    (b"{", "JSON, such as a hub answers with instead of a file, not weights", "download the file again"),
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of a file. `precision` is safetensors' name of the number format (`BF16`)."""

    name: str
    shape: tuple[int, ...]
    precision: str

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for side in self.shape:
            total *= side
        return total


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, all shards in order.

    Raises:
        UnsafeCheckpoint: only pickle files are there.
        ModelNotFound: no weights are there, or a shard that the index names is missing.
        DamagedCheckpoint: the index cannot be read, or names a file outside the folder.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _shards(indexes[0])
    files = [f for f in sorted(folder.glob("*.safetensors")) if ".fp16." not in f.name]
    if files:
        return files[:1]
    pickles = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        raise UnsafeCheckpoint(
            f"{str(pickles[0])!r} is a pickle file, which can run code when it is loaded, and is not accepted",
            hint="use the safetensors version of the model",
        )
    raise ModelNotFound(f"no safetensors file in {str(folder)!r}", hint="download the model again")


def files_of(place: Path) -> list[Path]:
    """The file itself, or the weight files of the folder of a component.

    Raises:
        As `weight_files`.
    """
    return [place] if place.is_file() else weight_files(place)


def weight_shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, by name, in a component's folder or a file.

    Raises:
        As `weight_files` and `read_tensors`.
    """
    return {tensor.name: tensor.shape for file in files_of(place) for tensor in read_tensors(file)}


def unreadable(file: Path, error: OSError) -> DamagedCheckpoint:
    """The error for a file of a model that the system does not let be read."""
    return DamagedCheckpoint(
        f"{str(file)!r} cannot be read: {error.strerror or error}", hint="check what it is, and who may read it"
    )


def check_regular(file: Path) -> None:
    """Refuse what is there and cannot be read to an end, such as a pipe, which would be waited for for ever.

    Raises:
        DamagedCheckpoint: it is neither a file nor a folder.
    """
    if is_there(file) and not (file.is_file() or file.is_dir()):
        raise DamagedCheckpoint(
            f"{str(file)!r} is no regular file", hint="put the model's own file in its place, or download it again"
        )


def read_tensors(file: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        DamagedCheckpoint: the file is empty, truncated, or not safetensors.
        UnsafeCheckpoint: it is a pickle under another name.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 — with numpy 0.2 s

    _sniff(file)
    try:
        with safe_open(str(file), framework="numpy") as opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                yield Tensor(name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(
            f"{str(file)!r} cannot be read as safetensors: {_reason(file, error)}", hint="download the file again"
        ) from error


def read_metadata(file: Path) -> dict[str, str]:
    """What the writer of a file that `read_tensors` accepted says about it."""
    found = _header(file)[1].get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def data_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """First byte and length of each tensor's data in a file that `read_tensors` accepted."""
    length, header = _header(file)
    return {
        name: (8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def header_digest(file: Path) -> str:
    """SHA-256 over the header and the size of a file that `read_tensors` accepted: changes with the file's layout."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
    return hashlib.sha256(header + str(file.stat().st_size).encode()).hexdigest()


def _sniff(file: Path) -> None:
    check_regular(file)
    try:
        with file.open("rb") as opened:
            start = opened.read(32)
    except OSError as error:
        raise unreadable(file, error) from error
    if len(start) < 8:
        what = f"is too short: {len(start)} of the 8 bytes that weights begin with" if start else "is empty"
        raise DamagedCheckpoint(f"{str(file)!r} {what}", hint="download the file again")
    # The first 8 bytes of safetensors are the header's length, and byte 9 opens its JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= HEADER_LIMIT:
        return
    for magic, what in _DISGUISES:
        if start.startswith(magic):
            raise UnsafeCheckpoint(f"{str(file)!r} is {what}", hint="use the safetensors version of the model")
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    for magic, what, hint in _MISTAKES:
        if text.startswith(magic):
            raise DamagedCheckpoint(f"{str(file)!r} is {what}", hint=hint)
    if text.isascii() and (said := " ".join(text.decode().split())).isprintable():
        raise DamagedCheckpoint(
            f"{str(file)!r} is text, not weights: it begins with {said!r}", hint="download the file again"
        )


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of the header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = msgspec.json.decode(opened.read(length))
    return length, header


def _reason(file: Path, error: Exception) -> str:
    """In plain words what the library's error means, where the sizes tell."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > HEADER_LIMIT:
        return f"by its first bytes its header would take {length:,} bytes, and {HEADER_LIMIT:,} are the most"
    if 8 + length > size:
        return f"it is truncated within its header of {length:,} bytes"
    try:
        end = max((first + count for first, count in data_ranges(file).values()), default=8 + length)
    except (msgspec.MsgspecError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return str(error)
    if end > size:
        return f"it is truncated: {size:,} of {end:,} bytes are there"
    return f"it goes on for {counted(size - end, 'byte')} after the last tensor" if end < size else str(error)


def _shards(index: Path) -> list[Path]:
    check_regular(index)
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes())["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except OSError as error:
        raise unreadable(index, error) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{str(index)!r} cannot be read: {error}", hint="download the model again") from error
    for shard in shards:
        if shard.parent != index.parent or shard.name in ("", "..") or shard.suffix != ".safetensors":
            raise DamagedCheckpoint(
                f"{str(index)!r} names {str(shard)!r}, which is not a weight file beside it",
                hint="download the model again",
            )
        if not (is_there(shard) and shard.is_file()):
            raise ModelNotFound(f"the shard {str(shard)!r} is missing", hint="download the model again")
    return shards
