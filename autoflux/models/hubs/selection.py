"""Which files of a repository are needed to run it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from autoflux.errors import DamagedDownload, ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from autoflux.models.hubs.values import RemoteFile
from autoflux.models.inventory import COMPONENTS
from autoflux.models.weights import PICKLE_SUFFIXES
from autoflux.units import format_bytes

SMALL_PARTS = ("scheduler", "tokenizer", "tokenizer_2")
INDEX = "model_index.json"

_STEMS = ("diffusion_pytorch_model", "model")
_ROOT_FILES = re.compile(r"model_index\.json|autoflux\.json|LICEN[SC]E[^/]*", re.IGNORECASE)
_SMALL_SUFFIXES = (".json", ".txt", ".model")
_SINGLE_SUFFIXES = (".safetensors", ".gguf")


def check_paths(files: Iterable[RemoteFile]) -> None:
    """Refuse a list of files that would be written anywhere but into the model's own folder, or over each other.

    Raises:
        DamagedDownload: a path is absolute, climbs, hides, or appears twice.
    """
    seen: set[str] = set()
    for file in files:
        if not is_inside(file.path):
            raise DamagedDownload(
                f"the hub lists the file {file.path!r}, which lies outside of the model; nothing was downloaded",
                hint="report it to the hub, and take the model from another place",
            )
        if file.path in seen or file.size_bytes < 0:
            raise DamagedDownload(f"the hub's list of files is not sound at {file.path!r}; nothing was downloaded")
        seen.add(file.path)


def is_inside(path: str) -> bool:
    """Whether a path from a hub stays in the folder that it is appended to, on every operating system."""
    steps = path.split("/")
    return all(step not in ("", ".", "..") for step in steps) and not re.search(r'[\\:*?"<>|\x00-\x1f]', path)


def needed_files(files: Sequence[RemoteFile], patterns: Sequence[str] = ()) -> tuple[RemoteFile, ...]:
    """The files to download: those that match `patterns`, or those that the layout of the repository asks for.

    A diffusers folder needs its four networks in safetensors, their configurations, the tokenizers and the scheduler;
    single files with the same weights beside it are left out. A repository that is one weight file needs that file.

    Raises:
        ModelNotFound: no file matches, or there are several single files to choose from.
        UnsupportedModel: a part is missing, or nothing in it can be run.
        UnsafeCheckpoint: its weights are pickle files only.
    """
    if patterns:
        return _matching(files, patterns)
    if any(file.path == INDEX for file in files):
        return _diffusers(files)
    return _single(files)


def _matching(files: Sequence[RemoteFile], patterns: Sequence[str]) -> tuple[RemoteFile, ...]:
    chosen = tuple(file for file in files if any(fnmatchcase(file.path, pattern) for pattern in patterns))
    _refuse_pickles(chosen)
    if not chosen:
        raise ModelNotFound(
            f"no file there matches {', '.join(map(repr, patterns))}; {_weights_listed(files)}",
            hint="name one of its files",
        )
    return chosen


def _diffusers(files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    chosen = [file for file in files if _ROOT_FILES.fullmatch(file.path)]
    for part in (*COMPONENTS, *SMALL_PARTS):
        inside = [file for file in files if str(PurePosixPath(file.path).parent) == part]
        if not inside:
            raise UnsupportedModel(
                f"the model has no part {part!r}",
                hint="autoflux runs models of the FLUX family in the diffusers layout, and single transformer files",
            )
        chosen += _network(part, inside) if part in COMPONENTS else _small(inside)
    return tuple(chosen)


def _small(inside: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [file for file in inside if file.path.endswith(_SMALL_SUFFIXES)]


def _network(part: str, inside: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Configuration and weights of one network: the shards if it has an index, else the one file."""
    by_name = {PurePosixPath(file.path).name: file for file in inside}
    config = [by_name[name] for name in ("config.json",) if name in by_name]
    for stem in _STEMS:
        if index := by_name.get(f"{stem}.safetensors.index.json"):
            shards = [f for name, f in by_name.items() if re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name)]
            return [*config, index, *shards]
        if whole := by_name.get(f"{stem}.safetensors"):
            return [*config, whole]
    _refuse_pickles(inside)
    raise UnsupportedModel(f"the part {part!r} of the model has no weights in safetensors")


def _single(files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    weights = [file for file in files if file.path.endswith(_SINGLE_SUFFIXES)]
    if len(weights) == 1:
        return tuple(file for file in files if file is weights[0] or _ROOT_FILES.fullmatch(file.path))
    if weights:
        raise ModelNotFound(
            f"the repository holds {len(weights)} weight files; {_weights_listed(files)}",
            hint="choose one with --file",
        )
    _refuse_pickles(files)
    raise UnsupportedModel("the repository holds neither a model_index.json nor a safetensors or GGUF file")


def _refuse_pickles(files: Iterable[RemoteFile]) -> None:
    for file in files:
        if file.path.lower().endswith(PICKLE_SUFFIXES):
            raise UnsafeCheckpoint(
                f"{file.path!r} is a pickle file, which can run code when it is loaded, and is not accepted",
                hint="use the safetensors version of the model",
            )


def _weights_listed(files: Sequence[RemoteFile]) -> str:
    weights = [f"{f.path} ({format_bytes(f.size_bytes)})" for f in files if f.path.endswith(_SINGLE_SUFFIXES)]
    more = f" and {len(weights) - 20} more" if len(weights) > 20 else ""
    return f"there are: {', '.join(weights[:20])}{more}" if weights else "it has no safetensors or GGUF files"
