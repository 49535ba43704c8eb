"""Where the hubs' own tools keep models, so that no file lies on the disk twice.

Hugging Face: `CACHE/models--OWNER--NAME/{blobs/CHECKSUM, refs/main, snapshots/COMMIT/PATH → blob}`.
ModelScope since 1.38: `CACHE/models/OWNER--NAME/snapshots/BRANCH/PATH`; before, `CACHE[/hub]/models/OWNER/NAME/PATH`
with `___` for dots in the name, which is used where it is there already.
Beside the snapshots autoflux keeps `.autoflux/COMMIT.json`: the files that belong there, and their checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from autoflux.errors import DamagedDownload, DamagedFile, OutputUnwritable
from autoflux.files import write_atomic
from autoflux.models.hubs.names import is_repo_id, is_revision
from autoflux.models.hubs.selection import check_paths
from autoflux.models.hubs.values import Listing, Record, RemoteFile, Source
from autoflux.paths import expanded

RECORDS = ".autoflux"
PARTIAL_SUFFIX = ".incomplete"
"""As the hubs' own tools call what they have not finished."""


@dataclass(frozen=True)
class Store(ABC):
    """The cache of one hub. Names and paths given to it must have been checked before."""

    source: ClassVar[Source]
    root: Path

    @abstractmethod
    def folder(self, repo_id: str) -> Path:
        """All that is kept of a model."""

    @abstractmethod
    def repo_ids(self) -> Iterator[str]:
        """The models of which there is anything."""

    @abstractmethod
    def snapshot(self, repo_id: str, commit: str) -> Path:
        """The folder in which the files of a commit appear."""

    @abstractmethod
    def commit(self, repo_id: str, revision: str | None = None) -> str | None:
        """The commit that a branch stands for here, as far as is known without asking the hub."""

    @abstractmethod
    def content(self, listing: Listing, file: RemoteFile) -> Path:
        """Where a file's bytes end up once verified."""

    @abstractmethod
    def partial(self, listing: Listing, file: RemoteFile) -> Path:
        """Where they gather until then; another content has another place."""

    @abstractmethod
    def lock(self, listing: Listing, file: RemoteFile) -> Path:
        """The lock that the hub's own tools take for this file."""

    @abstractmethod
    def finish(self, listing: Listing) -> None:
        """Make a complete listing the one that its branch stands for."""

    @abstractmethod
    def place(self, listing: Listing, file: RemoteFile) -> None:
        """Make the verified content appear in the snapshot."""

    def path(self, listing: Listing, file: RemoteFile) -> Path:
        """The file in its snapshot."""
        return self.snapshot(listing.repo_id, listing.commit) / file.path

    def pull_lock(self, repo_id: str) -> Path:
        """The lock that autoflux holds while it changes a model."""
        return self.root / ".locks" / f"{repo_id.replace('/', '--')}.autoflux.lock"

    def record_path(self, repo_id: str, commit: str) -> Path:
        return self.folder(repo_id) / RECORDS / f"{commit.replace('/', '--')}.json"

    def record(self, record: Record) -> None:
        """Keep what the hub said. Raises OutputUnwritable."""
        listing = record.listing
        path = self.record_path(listing.repo_id, listing.commit)
        make_folder(path.parent, inside=self.folder(listing.repo_id))
        write_atomic(path, record.to_json().encode())

    def recorded(self, repo_id: str, commit: str) -> Record | None:
        """What the hub said when autoflux downloaded the model; None if it did not, or it cannot be read."""
        return _read_record(self.record_path(repo_id, commit))


@dataclass(frozen=True)
class HuggingFaceStore(Store):
    """`HF_HUB_CACHE`, else `HF_HOME/hub`."""

    source = Source.HUGGINGFACE

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> HuggingFaceStore:
        if given := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
            return cls(expanded(given))
        base = environment.get("XDG_CACHE_HOME") or "~/.cache"
        return cls(expanded(environment.get("HF_HOME") or f"{base}/huggingface") / "hub")

    def folder(self, repo_id: str) -> Path:
        return self.root / f"models--{repo_id.replace('/', '--')}"

    def repo_ids(self) -> Iterator[str]:
        for folder in sorted(self.root.glob("models--*--*")):
            if is_repo_id(name := folder.name.removeprefix("models--").replace("--", "/")):
                yield name

    def snapshot(self, repo_id: str, commit: str) -> Path:
        return self.folder(repo_id) / "snapshots" / commit

    def commit(self, repo_id: str, revision: str | None = None) -> str | None:
        folder = self.folder(repo_id)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (folder / "refs" / (revision or "main")).read_text().strip()
            if is_revision(commit) and "/" not in commit and (folder / "snapshots" / commit).is_dir():
                return commit
        snapshots = _folders(folder / "snapshots")
        names = [path.name for path in snapshots if revision in (None, path.name)]
        return names[-1] if names else _recorded_commit(folder, revision)

    def content(self, listing: Listing, file: RemoteFile) -> Path:
        return self.folder(listing.repo_id) / "blobs" / (file.sha256 or file.git_sha1 or "")

    def partial(self, listing: Listing, file: RemoteFile) -> Path:
        content = self.content(listing, file)
        return content.with_name(content.name + PARTIAL_SUFFIX)

    def lock(self, listing: Listing, file: RemoteFile) -> Path:
        folder = self.root / ".locks" / self.folder(listing.repo_id).name
        return folder / f"{self.content(listing, file).name}.lock"

    def place(self, listing: Listing, file: RemoteFile) -> None:
        content, path = self.content(listing, file), self.path(listing, file)
        make_folder(path.parent, inside=self.folder(listing.repo_id))
        if not content.exists() or (path.exists() and path.resolve() == content.resolve()):
            return
        path.unlink(missing_ok=True)
        try:
            path.symlink_to(os.path.relpath(content, path.parent))
        except OSError:  # Windows without developer mode: as Hugging Face's own tools do
            content.replace(path)

    def finish(self, listing: Listing) -> None:
        if listing.revision == listing.commit:
            return
        refs = self.folder(listing.repo_id) / "refs"
        path = refs / listing.revision
        make_folder(path.parent, inside=self.folder(listing.repo_id))
        write_atomic(path, listing.commit.encode())


@dataclass(frozen=True)
class ModelScopeStore(Store):
    """`MODELSCOPE_CACHE`, else `~/.cache/modelscope`."""

    source = Source.MODELSCOPE

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> ModelScopeStore:
        return cls(expanded(environment.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"))

    def folder(self, repo_id: str) -> Path:
        return self._older(repo_id) or self.root / "models" / repo_id.replace("/", "--")

    def repo_ids(self) -> Iterator[str]:
        for models in (self.root / "models", self.root / "hub" / "models"):
            for folder in _folders(models):
                if is_repo_id(name := folder.name.replace("--", "/")):
                    yield name
                for inner in _folders(folder) if "--" not in folder.name else ():
                    if is_repo_id(name := f"{folder.name}/{inner.name.replace('___', '.')}"):
                        yield name

    def snapshot(self, repo_id: str, commit: str) -> Path:
        return self._older(repo_id) or self.folder(repo_id) / "snapshots" / commit

    def commit(self, repo_id: str, revision: str | None = None) -> str | None:
        if self._older(repo_id):
            return revision or "master"
        folder = self.folder(repo_id)
        names = [path.name for path in _folders(folder / "snapshots")]
        wanted = (revision,) if revision else ("master", "main", *names)
        return next((name for name in wanted if name in names), None) or _recorded_commit(folder, revision)

    def content(self, listing: Listing, file: RemoteFile) -> Path:
        return self.path(listing, file)

    def partial(self, listing: Listing, file: RemoteFile) -> Path:
        path = self.path(listing, file)
        return path.with_name(f"{path.name}.{(file.sha256 or str(file.size_bytes))[:16]}{PARTIAL_SUFFIX}")

    def lock(self, listing: Listing, file: RemoteFile) -> Path:
        key = f"modelscope-hub-download-lock-v2\0file\0model\0{listing.repo_id}\0{file.path}"
        return self.root / ".lock" / f"file_{hashlib.sha256(key.encode()).hexdigest()}.lock"

    def place(self, listing: Listing, file: RemoteFile) -> None:
        """The content lies there already."""

    def finish(self, listing: Listing) -> None:
        """A branch is a folder: nothing is left to do."""

    def _older(self, repo_id: str) -> Path | None:
        owner, _, name = repo_id.partition("/")
        for models in (self.root / "models", self.root / "hub" / "models"):
            folder = models / owner / name.replace(".", "___")
            if folder.is_dir() and any(folder.iterdir()):
                return folder
        return None


def stores(environment: Mapping[str, str] = os.environ) -> dict[Source, Store]:
    """The caches of both hubs, where the environment says they are."""
    return {
        Source.HUGGINGFACE: HuggingFaceStore.of(environment),
        Source.MODELSCOPE: ModelScopeStore.of(environment),
    }


def make_folder(folder: Path, *, inside: Path) -> None:
    """Create a folder, and make sure that no link leads it out of `inside`.

    Raises:
        DamagedDownload: it would lie elsewhere, or a file is in its place.
        OutputUnwritable: it cannot be created.
    """
    if not folder.resolve().is_relative_to(inside.resolve()):
        raise DamagedDownload(
            f"{str(folder)!r} leads out of the model's own folder through a link; nothing was written there",
            hint="remove the link",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DamagedDownload(
            f"a file lies where the folder {str(folder)!r} is needed", hint="remove that file"
        ) from error
    except OSError as error:
        raise OutputUnwritable(
            f"cannot create the folder {str(folder)!r}: {error.strerror or error}",
            hint="set HF_HUB_CACHE or MODELSCOPE_CACHE to a folder that you may write to",
        ) from error


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime)
    except OSError:
        return []


def _recorded_commit(folder: Path, revision: str | None) -> str | None:
    """The commit of a download that has not got as far as a snapshot."""
    for path in sorted((folder / RECORDS).glob("*.json")):
        record = _read_record(path)
        if record and revision in (None, record.listing.revision, record.listing.commit):
            return record.listing.commit
    return None


def _read_record(path: Path) -> Record | None:
    """A record, if it can be trusted as much as the hub itself: others may have written to the cache."""
    try:
        record = Record.from_json(path.read_bytes())
        check_paths(record.listing.files)
    except (OSError, DamagedFile, DamagedDownload):
        return None
    return record
