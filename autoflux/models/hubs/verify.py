"""Reading a downloaded model again, to find what has changed since."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from autoflux.errors import ModelNotFound
from autoflux.models.hubs.cached import CachedModel, on_disk
from autoflux.models.hubs.checksums import fault
from autoflux.models.hubs.stores import Store
from autoflux.models.hubs.values import RemoteFile, Source
from autoflux.values import Value

_CHECKSUM_NAME = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


class CheckedFile(Value, frozen=True, kw_only=True):
    """A file of a model; `fault` says what is wrong with it, `checked` whether there is a checksum to compare."""

    path: str
    size_bytes: int
    fault: str | None = None
    checked: bool = True


class Verification(Value, frozen=True, kw_only=True):
    """What reading a model again has shown."""

    name: str
    source: Source
    repo_id: str
    path: str
    files: tuple[CheckedFile, ...]

    @property
    def faulty(self) -> tuple[CheckedFile, ...]:
        return tuple(file for file in self.files if file.fault)


OnFile = Callable[[RemoteFile], None]
OnBytes = Callable[[int], None]


def expected_files(model: CachedModel, store: Store) -> tuple[RemoteFile, ...]:
    """What a model should hold: as recorded, or as its layout and the names of Hugging Face's blobs say.

    Raises:
        ModelNotFound: nothing is missing by the layout, and no name says a checksum.
    """
    if record := store.recorded(model.repo_id, model.commit):
        return record.listing.files
    named = named_files(Path(model.path))
    missing = tuple(RemoteFile(path=path, size_bytes=0) for path in model.missing)
    if not missing and not any(file.sha256 or file.git_sha1 for file in named):
        raise ModelNotFound(
            f"no checksums are known for {model.name!r}: another tool downloaded it",
            hint=f"compare it with its hub: autoflux models pull {model.repo_id} --source {model.source} --repair",
        )
    return (*named, *missing)


def named_files(folder: Path) -> tuple[RemoteFile, ...]:
    """The files of a snapshot, with the checksums that the names of Hugging Face's blobs say."""
    return tuple(_from_blob_name(folder, file) for file in on_disk(folder))


def verify(
    model: CachedModel,
    stores: Mapping[Source, Store],
    on_file: OnFile = lambda _file: None,
    on_bytes: OnBytes = lambda _count: None,
) -> Verification:
    """Read every file of a model and compare checksums.

    Raises:
        ModelNotFound: no checksums are known.
    """
    checked = []
    for file in expected_files(model, stores[model.source]):
        on_file(file)
        wrong = fault(Path(model.path) / file.path, file, on_bytes)
        known = bool(file.sha256 or file.git_sha1)
        checked.append(CheckedFile(path=file.path, size_bytes=file.size_bytes, fault=wrong, checked=known))
    return Verification(
        name=model.name, source=model.source, repo_id=model.repo_id, path=model.path, files=tuple(checked)
    )


def _from_blob_name(folder: Path, file: RemoteFile) -> RemoteFile:
    link = folder / file.path
    name = link.readlink().name if link.is_symlink() else ""
    if not _CHECKSUM_NAME.fullmatch(name):
        return file
    return file.replace(sha256=name) if len(name) == 64 else file.replace(git_sha1=name)
