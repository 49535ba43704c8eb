"""What a hub says of a model, and what is kept of it."""

from __future__ import annotations

from enum import StrEnum

from autoflux.values import Value


class Source(StrEnum):
    """A hub that models come from."""

    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"

    @property
    def label(self) -> str:
        """The name that people know it by."""
        return {"huggingface": "Hugging Face", "modelscope": "ModelScope"}[self.value]

    @property
    def other(self) -> Source:
        """The hub that may have what this one has not."""
        return next(source for source in Source if source != self)


class HubId(Value, frozen=True, kw_only=True):
    """A model on one hub; `repo_id` is `owner/name`."""

    source: Source
    repo_id: str


class Reference(Value, frozen=True, kw_only=True):
    """A model as someone named it: the same model's ids in the order in which they should be tried."""

    name: str
    ids: tuple[HubId, ...]
    revision: str | None = None
    file: str | None = None


class RemoteFile(Value, frozen=True, kw_only=True):
    """A file of a model; `path` is relative, with forward slashes.

    A hub gives the SHA-256 of the content, or git's SHA-1 of it as a blob (Hugging Face, for small files).
    """

    path: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


class Licence(Value, frozen=True, kw_only=True):
    """The terms of a model as its hub states them."""

    name: str
    url: str


class Listing(Value, frozen=True, kw_only=True):
    """The files of a model at one commit."""

    source: Source
    repo_id: str
    revision: str
    """The branch or tag that was asked for."""
    commit: str
    """What it stood for; on ModelScope, whose cache knows branches only, the same as `revision`."""
    licence: Licence | None
    gated: bool
    files: tuple[RemoteFile, ...]

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)


class Record(Value, frozen=True, kw_only=True):
    """What is kept beside a model: the files that belong there, and the paths of those that were verified."""

    schema: int = 1
    listing: Listing
    verified: tuple[str, ...] = ()

    def vouches_for(self, file: RemoteFile) -> bool:
        """Whether a file with just this content was verified when it was written."""
        return file.path in self.verified and file in self.listing.files
