"""From what a user calls a model to the model: a registered name, a path, or a name of the catalogue."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from autoflux.errors import ContradictoryWishes, ModelNotFound, UnknownName, UsageError
from autoflux.files import is_there
from autoflux.models import catalogue
from autoflux.models.absent import absent_model
from autoflux.models.hubs.cached import CachedModel, find_cached, model_path
from autoflux.models.hubs.names import default_source, parse_reference
from autoflux.models.hubs.stores import stores
from autoflux.models.hubs.values import Reference
from autoflux.models.inventory import FindBase, take_stock
from autoflux.models.values import Family, Layout, Model
from autoflux.models.weights import PICKLE_SUFFIXES
from autoflux.paths import expanded

_SUFFIXES = (".safetensors", ".gguf", *PICKLE_SUFFIXES)
"""By which a name that leads nowhere is known to be meant as a file."""


def find(model: str, registered: Mapping[str, str], base: str | None = None) -> Model:
    """The model of that name, at that path, or downloaded under that name or id. Those of the catalogue may be absent.

    `registered` gives the paths of names that plugins offer; `base` is the name or folder of a model that has what a
    single file lacks, by default what `AUTOFLUX_BASE` names, the folder of the file, or a FLUX.1 from the hubs' caches.

    Raises:
        UsageError: it is empty.
        ContradictoryWishes: a base was given, and the model lacks nothing.
        UnknownName: neither a name nor a path.
        ModelNotFound: a model of a hub that is not on this machine, or only in part.
        AutofluxError: what `take_stock` says of the folder or file.
    """
    found = _find(model, registered, base)
    if base is not None and not found.base_path:
        raise ContradictoryWishes(
            f"{model!r} has all its parts, and nothing of the base {base!r} would be used", hint="drop --base"
        )
    return found


def usual_base(environment: Mapping[str, str] = os.environ) -> str | None:
    """What `AUTOFLUX_BASE` says, for models that need one."""
    return environment.get("AUTOFLUX_BASE") or None


def _find(model: str, registered: Mapping[str, str], base: str | None) -> Model:
    if model in registered:
        return take_stock(Path(registered[model]), model)
    if not model.strip():
        raise UsageError("the name of the model is empty", hint="`autoflux models list` lists what is here")
    path = expanded(model)
    if is_there(path) or _is_file_name(model):
        return take_stock(path, find_base=_base_finder(path, base, registered))
    if reference := parse_reference(model, usual=default_source()):
        return _downloaded(reference, base, registered)
    if _is_path(model):
        return take_stock(path)
    names = (known.name for known in catalogue.CATALOGUE)
    raise UnknownName("model", model, [*registered, *names], hint="`autoflux models list` lists what is here")


def _downloaded(reference: Reference, base: str | None, registered: Mapping[str, str]) -> Model:
    found = find_cached(reference, stores())
    if found:
        path = model_path(found, reference.file)
        finder = _base_finder(path, base, registered)
        return take_stock(path, found.name, find_base=finder, published_as=found.repo_id)
    if entry := catalogue.find(reference.ids[0].repo_id):
        return absent_model(entry)
    raise ModelNotFound(
        f"{reference.name!r} is neither a folder nor a model that was downloaded to this machine",
        hint=f"autoflux models pull {reference.name}",
    )


def require_weights(model: Model) -> None:
    """Refuse a model that is known from the catalogue only.

    Raises:
        ModelNotFound: its weights are not on this machine.
    """
    if model.layout == Layout.ABSENT:
        raise ModelNotFound(
            f"the weights of {model.name!r} are not on this machine", hint=f"autoflux models pull {model.name}"
        )


def _base_finder(file: Path, base: str | None, registered: Mapping[str, str]) -> FindBase:
    named = usual_base() if base is None else base
    return lambda family: _find_default_base(file, family) if named is None else _find_base(named, registered)


def _find_base(base: str, registered: Mapping[str, str]) -> Path:
    if base in registered:
        return Path(registered[base])
    if not base.strip():
        raise UsageError("the name of the base is empty", hint="give the folder of a FLUX.1 model, or a name")
    path = expanded(base)
    if is_there(path):
        if path.is_dir():
            return path
        raise ModelNotFound(
            f"the base {base!r} is a file, and a folder is needed",
            hint="give the folder of a FLUX.1 model in the diffusers layout",
        )
    if reference := parse_reference(base, usual=default_source()):
        if folder := _whole_folder(find_cached(reference, stores())):
            return folder
        raise ModelNotFound(f"the base {base!r} is not on this machine", hint=f"autoflux models pull {reference.name}")
    raise ModelNotFound(
        f"the base {base!r} is neither a folder nor a known name",
        hint="give the folder of a FLUX.1 model in the diffusers layout",
    )


def _find_default_base(file: Path, family: Family) -> Path:
    """Beside the file, as in FLUX.1's own repositories, or any FLUX.1 in the caches: all have the same encoders."""
    if (file.parent / "tokenizer_2").is_dir():
        return file.parent
    # The same family first: it also has the right scheduler.
    for entry in sorted(catalogue.CATALOGUE, key=lambda entry: entry.family != family):
        reference = parse_reference(entry.name)
        if reference and (folder := _whole_folder(find_cached(reference, stores()))):
            return folder
    raise ModelNotFound(
        f"{str(file)!r} lacks tokenizers or text encoders, and no FLUX.1 that has them is on this machine",
        hint="give the folder of one with --base, or get one: autoflux models pull flux.1-schnell",
    )


def _whole_folder(found: CachedModel | None) -> Path | None:
    return Path(found.path) if found and found.complete else None


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.startswith(("~", "."))


def _is_file_name(text: str) -> bool:
    return "://" not in text and Path(text).suffix.lower() in _SUFFIXES
