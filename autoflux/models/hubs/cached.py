"""What of which models is on this machine."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Mapping
from pathlib import Path

from autoflux.errors import ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from autoflux.files import is_text
from autoflux.models.hubs.lacking import lacking, read_json
from autoflux.models.hubs.names import catalogue_name
from autoflux.models.hubs.selection import INDEX
from autoflux.models.hubs.stores import PARTIAL_SUFFIX, RECORDS, Store
from autoflux.models.hubs.values import HubId, Record, Reference, RemoteFile, Source
from autoflux.units import counted
from autoflux.values import Value

_SINGLE_SUFFIXES = (".safetensors", ".gguf")


class CachedModel(Value, frozen=True, kw_only=True):
    """A model in the cache of a hub. `missing` are its files that are not there, or not whole."""

    name: str
    source: Source
    repo_id: str
    commit: str
    path: str
    size_bytes: int
    """On the disk, with what is unfinished and with other revisions."""
    complete: bool
    missing: tuple[str, ...] = ()
    unusable: str | None = None
    """Why what is there could not be run, were it whole or not."""
    licence: str | None = None
    unreadable: str | None = None
    """Why it could not be looked at: another user's, or held by another program. Nothing else is known of it then."""


def cached_models(stores: Mapping[Source, Store], *, everything: bool = False) -> list[CachedModel]:
    """The models in both caches: those that autoflux downloaded, knows, or can see to be of the FLUX family.

    Args:
        stores: the caches.
        everything: other people's models as well, such as language models.
    """
    found = []
    for source, store in stores.items():
        for repo_id in dict.fromkeys(store.repo_ids()):
            model = _look_at_any(HubId(source=source, repo_id=repo_id), store)
            if model and (everything or _is_ours(model, store)):
                found.append(model)
    return found


def _look_at_any(hub_id: HubId, store: Store) -> CachedModel | None:
    """One that cannot be read does not hide the others."""
    try:
        return look_at(hub_id, store)
    except OSError as error:
        return CachedModel(
            name=catalogue_name(hub_id) or hub_id.repo_id,
            source=hub_id.source,
            repo_id=hub_id.repo_id,
            commit="",
            path=str(error.filename or store.root),
            size_bytes=0,
            complete=False,
            unreadable=error.strerror or str(error),
        )


def find_cached(reference: Reference, stores: Mapping[Source, Store]) -> CachedModel | None:
    """The first of a reference's ids that is complete here, else the first of which there is anything."""
    looked = (look_at(hub_id, stores[hub_id.source], reference.revision) for hub_id in reference.ids)
    found = [model for model in looked if model]
    return next((model for model in found if model.complete), found[0] if found else None)


def look_at(hub_id: HubId, store: Store, revision: str | None = None) -> CachedModel | None:
    """What of one model there is; None if nothing."""
    commit = store.commit(hub_id.repo_id, revision)
    if commit is None:
        return None
    folder = store.snapshot(hub_id.repo_id, commit)
    record = store.recorded(hub_id.repo_id, commit)
    missing, unusable = (_missing_recorded(folder, record), None) if record else _judged_by_layout(folder)
    return CachedModel(
        name=catalogue_name(hub_id) or hub_id.repo_id,
        source=hub_id.source,
        repo_id=hub_id.repo_id,
        commit=commit,
        path=str(folder),
        size_bytes=disk_bytes(store.folder(hub_id.repo_id)),
        complete=not (missing or unusable),
        missing=missing,
        unusable=unusable,
        licence=record.listing.licence.name if record and record.listing.licence else None,
    )


def model_path(model: CachedModel, file: str | None = None) -> Path:
    """What to load: the folder, or the file in it where the model is a single one.

    Raises:
        ModelNotFound: it is not complete here.
    """
    if model.unreadable:
        raise ModelNotFound(
            f"{model.name!r} is on this machine and cannot be read: {model.unreadable} ({model.path})",
            hint="check whose it is, and what else uses it",
        )
    if model.unusable:
        raise ModelNotFound(
            f"{model.name!r} is on this machine and cannot be run: {model.unusable}",
            hint=f"autoflux models pull {model.repo_id} --source {model.source}",
        )
    if not model.complete:
        listed = ", ".join(model.missing[:3]) + (" …" if len(model.missing) > 3 else "")
        raise ModelNotFound(
            f"{model.name!r} is on this machine only in part: {counted(len(model.missing), 'file')} missing ({listed})",
            hint=f"autoflux models pull {model.repo_id} --source {model.source}",
        )
    folder = Path(model.path)
    if file:
        return folder / file
    weights = [path for path in _files_in(folder) if path.name.endswith(_SINGLE_SUFFIXES)]
    return weights[0] if len(weights) == 1 and not (folder / INDEX).exists() else folder


def disk_bytes(folder: Path) -> int:
    """The bytes of all files in a folder, each counted once however many names it has; links are not followed."""
    sizes = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # whoever downloads renames and removes files meanwhile
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def on_disk(folder: Path) -> list[RemoteFile]:
    """The files of a snapshot that are there, in the form of a hub's list."""
    return [
        RemoteFile(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size)
        for path in _files_in(folder)
    ]


def _files_in(folder: Path) -> list[Path]:
    hidden = (RECORDS,)
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and is_text(path.relative_to(folder))  # no hub has others
        and not path.name.endswith(PARTIAL_SUFFIX)
        and not set(hidden) & set(path.relative_to(folder).parts)
    ]


def _missing_recorded(folder: Path, record: Record) -> tuple[str, ...]:
    return tuple(f.path for f in record.listing.files if not _is_whole(folder / f.path, f.size_bytes))


def _is_whole(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _judged_by_layout(folder: Path) -> tuple[tuple[str, ...], str | None]:
    """For what other tools downloaded: what is missing, and why it cannot be run."""
    try:
        return lacking(folder, on_disk(folder)), None
    except (UnsupportedModel, UnsafeCheckpoint) as error:
        return (), error.message


def _is_ours(model: CachedModel, store: Store) -> bool:
    if model.unreadable:
        return True
    if model.name != model.repo_id or store.recorded(model.repo_id, model.commit):
        return True
    return str(read_json(Path(model.path) / INDEX).get("_class_name", "")).startswith("Flux")
