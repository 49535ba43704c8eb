"""Removing a model from the cache of its hub, and nothing that another one needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from autoflux.errors import OutputUnwritable, ServiceUnavailable
from autoflux.models.hubs.cached import CachedModel
from autoflux.models.hubs.stores import Store, make_folder
from autoflux.models.hubs.values import Source
from autoflux.values import Value


class Removal(Value, frozen=True, kw_only=True):
    """What removing a model does or did: bytes that become free, and files that stay because others link to them."""

    name: str
    source: Source
    repo_id: str
    freed_bytes: int
    kept: tuple[str, ...]


def plan_removal(model: CachedModel, stores: Mapping[Source, Store]) -> Removal:
    """What `remove` would do; changes nothing."""
    folder = stores[model.source].folder(model.repo_id)
    used = _used_by_others(folder, stores)
    files = _own_files(folder)
    return Removal(
        name=model.name,
        source=model.source,
        repo_id=model.repo_id,
        freed_bytes=sum(_freed(path) for path in files if path not in used),
        kept=tuple(str(path) for path in files if path in used),
    )


def remove(model: CachedModel, stores: Mapping[Source, Store]) -> Removal:
    """Delete all revisions of a model. What links lead to outside of its folder is never touched.

    Raises:
        ServiceUnavailable: it is being downloaded.
        OutputUnwritable: a file cannot be deleted; the others are gone.
    """
    store = stores[model.source]
    path = store.pull_lock(model.repo_id)
    make_folder(path.parent, inside=store.root)
    try:
        with FileLock(path, timeout=0, mode=0o664):
            planned = plan_removal(model, stores)
            _delete(store.folder(model.repo_id), {Path(kept) for kept in planned.kept})
    except Timeout as error:
        raise ServiceUnavailable(
            f"{model.name!r} is being downloaded or removed by another process", hint="wait for it to end"
        ) from error
    except OSError as error:
        raise OutputUnwritable(f"cannot remove {error.filename!r}: {error.strerror or error}") from error
    return planned


def _delete(folder: Path, kept: set[Path]) -> None:
    if folder.is_symlink():
        folder.unlink()
        return
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            if (path := Path(parent, name)) not in kept:
                path.unlink()
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def _own_files(folder: Path) -> list[Path]:
    if folder.is_symlink():
        return []
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in sorted(names)]


def _used_by_others(folder: Path, stores: Mapping[Source, Store]) -> set[Path]:
    """Files of this folder that links in other models lead to, as paths below `folder`."""
    real = folder.resolve()
    used = set()
    for store in stores.values():
        for repo_id in store.repo_ids():
            other = store.folder(repo_id)
            if other == folder:
                continue
            for path in other.rglob("*"):
                if path.is_symlink() and (target := path.resolve()).is_relative_to(real):
                    used.update(_below(folder / target.relative_to(real)))
    return used


def _below(path: Path) -> list[Path]:
    return _own_files(path) if path.is_dir() else [path]


def _freed(path: Path) -> int:
    """A link takes no room, and a file with another name elsewhere stays."""
    status = path.lstat()
    return 0 if path.is_symlink() or status.st_nlink > 1 else status.st_size
