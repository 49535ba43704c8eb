"""What a snapshot that another tool downloaded lacks, by its layout: nothing records what belongs there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from autoflux.errors import ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from autoflux.models.folders import FILES_OF_SMALL_PARTS, is_loadable
from autoflux.models.hubs.selection import INDEX, needed_files
from autoflux.models.hubs.values import RemoteFile
from autoflux.models.inventory import COMPONENTS
from autoflux.models.weights import PICKLE_SUFFIXES

_SHARD_INDEX = ".safetensors.index.json"
_ENCODERS = ("text_encoder", "text_encoder_2")


def lacking(folder: Path, files: Sequence[RemoteFile]) -> tuple[str, ...]:
    """Paths that loading the model would need beside the `files` that are there.

    Raises:
        UnsupportedModel, UnsafeCheckpoint: whatever is missing, it could not be run.
    """
    inside: dict[str, list[str]] = {part: [] for part in (*COMPONENTS, *FILES_OF_SMALL_PARTS)}
    for file in files:
        path = PurePosixPath(file.path)
        inside.setdefault(str(path.parent), []).append(path.name)
    if INDEX in inside.get(".", ()):
        if not (kind := str(read_json(folder / INDEX).get("_class_name", "Flux"))).startswith("Flux"):
            raise UnsupportedModel(f"it is a {kind}; autoflux runs models of the FLUX family")
        return tuple(path for part, names in inside.items() for path in _lacking_in(part, names, folder))
    if inside["transformer"]:  # the folder of a network, and not a file in a repository of single files
        return (INDEX,)
    with contextlib.suppress(ModelNotFound):  # several single files: each is complete in itself
        needed_files(files)
    return ()


def _lacking_in(part: str, names: Sequence[str], folder: Path) -> Iterator[str]:
    if part in COMPONENTS:
        yield from _lacking_of_network(part, names, folder)
    elif part in FILES_OF_SMALL_PARTS and not is_loadable(part, names):
        begun = (needed for needed in FILES_OF_SMALL_PARTS[part] if set(needed) & set(names))
        yield from (f"{part}/{name}" for name in next(begun, FILES_OF_SMALL_PARTS[part][0]) if name not in names)


def _lacking_of_network(part: str, names: Sequence[str], folder: Path) -> Iterator[str]:
    """As `weight_files` looks for them when the model is loaded."""
    if "config.json" not in names:
        yield f"{part}/config.json"
    if indexes := sorted(name for name in names if name.endswith(_SHARD_INDEX)):
        yield from (f"{part}/{shard}" for shard in _shards(folder / part / indexes[0]) if shard not in names)
    elif not any(name.endswith(".safetensors") and ".fp16." not in name for name in names):
        if pickles := [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]:
            pickle = f"{part}/{pickles[0]}"
            raise UnsafeCheckpoint(f"{pickle!r} is a pickle file, which can run code when it is loaded")
        yield f"{part}/{'model' if part in _ENCODERS else 'diffusion_pytorch_model'}.safetensors"


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({Path(str(name)).name for name in names})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        data: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
    return data
